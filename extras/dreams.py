"""Does a rendered world hold together when it is dreamt? Of these, all parts are known."""

import numpy as np
import torch

import genie_mini as gm
from extras import worlds


@torch.no_grad()
def evaluate_world(genie, data, indices, steps=64, hold=8, seed=0):
    """Of dreams of random buttons, each held for a while:

    one_hero, one_fish: share of frames with exactly one. walls_kept: of the first frame's wall
    pixels, those still there. ball_on_course: share of dreams whose ball, after 4 real frames and 8
    generated ones, is within 2 pixels of the game's own. Its way can only be known by memory. None
    where there is no such thing, as in other videos, of which nobody knows what must be there.
    """
    def dream(x, i):
        plan = torch.randint(genie.config.num_actions, (len(x), steps // hold),
                             generator=gm.seeded(seed, i)).repeat_interleave(hold, dim=1)
        made = genie.rollout(x[:, 0], plan, gm.seeded(seed, i, 1)).cpu()    # (B, steps, H, W)
        counts = [torch.tensor(np.stack([count(clip) for clip in made.numpy()]))
                  for count in (worlds.count_heroes, worlds.count_fish)]
        walls = torch.from_numpy(worlds.demo_walls(x[:, :1].cpu().numpy()))
        kept = (made & walls).sum((-2, -1)) / walls.sum((-2, -1))
        return *((n == 1).float() for n in counts), kept                # each (B, steps)

    def flight(x, i):
        actions = genie.watch(x)[2][:, 3:11]                            # from frame 4 to frame 12
        made = genie.rollout(x[:, :4], actions, gm.seeded(seed, i, 2))[:, -1].cpu().numpy()
        place, seen = worlds.find_balls(x[:, 11].cpu().numpy())
        return (torch.from_numpy(worlds.is_ball_near(made, place)[seen]).float(),)

    result = dict.fromkeys(("one_hero", "one_fish", "walls_kept", "ball_on_course"))
    if data.world in ("demo world", "ball world"):
        hero, fish, kept = gm.over_batches(genie, data, indices, dream)
        result["one_hero"] = hero.mean().item()
    if data.world == "demo world":
        result["one_fish"], result["walls_kept"] = fish.mean().item(), kept.mean().item()
    if data.world == "ball world":
        result["ball_on_course"] = gm.over_batches(genie, data, indices, flight)[0].mean().item()
    return result
