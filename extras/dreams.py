"""Does a rendered world hold together when it is dreamt? Of these, all parts are known."""

import torch

import genie_mini as gm
from extras import worlds


@torch.no_grad()
def evaluate_world(genie, data, indices, steps=64, hold=8, seed=0):
    """Of dreams of random buttons, each held for a while:

    one_hero: share of frames with exactly one hero; walls_kept: of the first frame's wall pixels.
    ball_on_course: share of dreams whose ball, after 4 real frames and 8 generated ones, is within
    2 pixels of the game's own. Its way can only be known by memory. None where there is no such
    thing, as in other videos, of which nobody knows what must be there.
    """
    def dream(x, i):
        plan = torch.randint(genie.config.num_actions, (len(x), steps // hold),
                             generator=gm.seeded(seed, i)).repeat_interleave(hold, dim=1)
        made = genie.rollout(x[:, 0], plan, gm.seeded(seed, i, 1)).cpu()   # (B, steps, H, W)
        heroes = torch.tensor([worlds.count_heroes(clip).tolist() for clip in made.numpy()])
        walls = torch.from_numpy(worlds.demo_walls(x[:, :1].cpu().numpy()))
        return (heroes == 1).float(), (made & walls).sum((-2, -1)) / walls.sum((-2, -1))

    def flight(x, i):
        actions = genie.watch(x)[2][:, 3:11]                            # from frame 4 to frame 12
        made = genie.rollout(x[:, :4], actions, gm.seeded(seed, i, 2))[:, -1].cpu().numpy()
        place, seen = worlds.find_balls(x[:, 11].cpu().numpy())
        return (torch.from_numpy(worlds.is_ball_near(made, place)[seen]).float(),)

    result = {"one_hero": None, "walls_kept": None, "ball_on_course": None}
    if data.world in ("demo world", "ball world"):
        one, kept = gm.over_batches(genie, data, indices, dream)           # each (S, steps)
        result["one_hero"] = one.mean().item()
    if data.world == "demo world":
        result["walls_kept"] = kept.mean().item()
    if data.world == "ball world":
        result["ball_on_course"] = gm.over_batches(genie, data, indices, flight)[0].mean().item()
    return result
