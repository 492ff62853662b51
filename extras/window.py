"""What a model shows: the pictures that training and `eval` draw; `play`, and its window."""

import itertools
import re
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

import data_prep
import genie_mini as gm
from extras import files
from extras.command_line import find_data, load_run
from extras.files import UserError
from extras.pictures import arrow, beside, in_colour, save_gif, save_sheet, titled


def three_clips(genie, data, indices):
    """Three sequences (3, 16, 64, 64) to draw, spread over `indices`."""
    return data.frames(indices[:: max(1, len(indices) // 3)][:3]).to(genie.device)


def draw_reconstruction(genie, data, indices, path):
    """Three real clips and what the tokenizer makes of them."""
    x = three_clips(genie, data, indices)
    rows = torch.stack([x, (genie.tokenizer(x)[0] > 0).byte()], dim=1)  # real, decoded, real, ...
    save_sheet(rows.flatten(0, 1).cpu(), ["real", "decoded"] * len(x), path, scale=1)


def draw_rollout(genie, data, indices, path):
    """Three clips: real, then generated from frame 1 with the inferred and with other actions."""
    x = three_clips(genie, data, indices)
    inferred, rows = genie.watch(x)[2], [x]
    for actions in (inferred, inferred.flip(1)):
        rows.append(torch.cat([x[:, :1], genie.rollout(x[:, 0], actions, gm.seeded(0))], dim=1))
    save_sheet(torch.stack(rows, dim=1).flatten(0, 1).cpu(),
                         ["real", "inferred", "reversed"] * len(x), path, scale=1)


def draw_buttons(genie, frames, path):
    """What each button does: held down, one a row, from that of the frames (B, H, W) in which they
    differ most; last, its mean motion as an arrow over all of them."""
    motion, _, lively = button_motion(genie, frames)
    motion, actions = motion.tolist(), held_buttons(genie, 7)
    first = frames[lively][None].to(genie.device).expand(len(actions), gm.SIZE, gm.SIZE)
    made = torch.cat([first[:, None], genie.rollout(first, actions, gm.seeded(0))], dim=1).cpu()
    rows = [[*clip.numpy(), arrow(dy, dx)] for clip, (dy, dx) in zip(made, motion)]
    labels = [f"{a}: {dy:+.1f} {dx:+.1f}" for a, (dy, dx) in enumerate(motion)]
    save_sheet(rows, labels, path)


@torch.no_grad()
def button_motion(genie, frames, seed=0):
    """What each button moves, on average over real frames (B, H, W).

    Returns which way, (num_actions, 2), how many pixels change, (num_actions,), and the number of
    the frame in which the buttons differ most. (dy, dx) leads from the centre of the pixels that
    went out to the centre of those that lit up. So the direction counts, less the length: a thing
    that moves a little lights up its edge alone. What moves by itself does so under every button,
    either way, and averages out.
    """
    side = torch.arange(gm.SIZE)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)      # (H, W, 2)

    def centre(pixels):
        weight = pixels.float()[..., None]                              # (B, H, W, 1)
        return (weight * grid).sum((1, 2)) / weight.sum((1, 2)), pixels.any(-1).any(-1)

    state, motions, made = genie.start(frames), [], []
    for action in range(genie.config.num_actions):
        made.append(genie.step(state, action, gm.seeded(seed, action))[0].cpu())
        (new, lit), (old, out) = centre(made[-1] > frames), centre(frames > made[-1])
        motions.append((new - old)[lit & out].mean(dim=0) if (lit & out).any() else torch.zeros(2))
    made = torch.stack(made)                                            # (num_actions, B, H, W)
    differ = made.float().var(dim=0).sum((1, 2))                        # (B,)
    return torch.stack(motions), gm.errors(made, frames).mean(1), int(differ.argmax())


def arrow_keys(motion, changed):
    """Which button each arrow key and the space bar press: {key: action}.

    motion (num_actions, 2) and changed (num_actions,) are those of button_motion. An arrow takes
    the button that moves things farthest its way, the space bar the one that changes least.
    """
    ways = {"up": (-1.0, 0.0), "down": (1.0, 0.0), "left": (0.0, -1.0), "right": (0.0, 1.0)}
    keys = {key: int((motion @ torch.tensor(way)).argmax()) for key, way in ways.items()}
    return {**keys, " ": int(changed.argmin())}


def screen():
    """matplotlib's pyplot, where it can open a window. Raises UserError where it can open none."""
    try:
        import matplotlib.pyplot as plt                  # slow to import: only here
        backend = plt.get_backend()
        if re.search("gtk|mac|qt|tk|webagg|wx", backend.lower()):
            plt.switch_backend(backend)                  # now, if a part of it is missing
            return plt
    except (ImportError, RuntimeError, ValueError) as error:     # a backend that is not there
        raise UserError(f"matplotlib cannot open a window ({error}); unset MPLBACKEND, or"
                        " pip install tornado and set it to WebAgg") from None
    raise UserError(f"no window can open here (matplotlib draws by {backend}): with MPLBACKEND set"
                    " to WebAgg it opens in a browser (pip install tornado), --out roll.gif saves"
                    " a GIF, and extras.pictures.Animation plays in a notebook")


@torch.no_grad()
def sketch(genie, state):
    """What each button would most likely show next, (num_actions, 64, 64) uint8 of 0/1, from the
    state of one player (B = 1): in a single MaskGIT pass for all, which remembers nothing.

    To the models these are frames of one clip, all at the same position: each sees the past and
    itself, and not the others. (Where Genie.step begins a new memory, it knows less of a past.)
    """
    n, past = genie.config.num_actions, state.tokens.shape[1]
    sees = torch.cat([torch.ones(n, past), torch.eye(n)], dim=1).bool().to(genie.device)
    layout = torch.full((n,), past, device=genie.device), sees
    tokens = state.tokens.new_zeros(1, n, state.tokens.shape[2])        # none is looked at
    with gm.autocast(genie.config.precision, genie.device):
        latents = genie.lam.quantizer.codebook[None]                    # (1, n, L)
        logits, _ = genie.dynamics(tokens, tokens == 0, latents, state.dynamics, layout)
        quantized = genie.tokenizer.quantizer.codebook[logits.argmax(dim=-1)]
        return (genie.tokenizer.decode(quantized, state.decoder, layout)[0][0] > 0).byte()


class Window:
    """A dream in a matplotlib window: a timer moves it on, and keys choose which way.

    In a row under the picture stand the frames that the buttons would lead to, only sketched: it
    must not slow the game.
    """

    KEEP = 1200                                 # frames kept for S: two minutes at 10 FPS
    HELP = "arrows, space, digits: press a button   R: restart elsewhere   S: save a GIF   Q: quit"

    def __init__(self, genie, firsts, arrows, generator):
        """Begin at the first of firsts (n, 64, 64); R goes on to the next.

        arrows: which button "up", "down", "left", "right" and " " press. generator: what is random.
        """
        import matplotlib.pyplot as plt
        self.genie, self.firsts, self.arrows, self.generator = genie, firsts, arrows, generator
        self.buttons = list(range(genie.config.num_actions))
        self.keys = {**{str(a): a for a in self.buttons}, **arrows}
        self.turn, self.close = -1, lambda: plt.close(self.figure)
        self.figure = plt.figure("genie_mini", figsize=(7, 8))
        canvas = self.figure.canvas
        canvas.mpl_disconnect(canvas.manager.key_press_handler_id)      # S, Q and R are ours
        canvas.mpl_connect("key_press_event", self.on_key)
        canvas.mpl_connect("key_release_event", self.on_release)
        canvas.mpl_connect("close_event", lambda _: self.timer.stop())
        self.timer = canvas.new_timer(interval=100)      # ms: 10 FPS, as in the video
        self.timer.add_callback(self.tick)
        self.restart()
        self.lay_out()
        self.timer.start()

    def restart(self):
        """Begin anew, at the next first frame."""
        self.turn = (self.turn + 1) % len(self.firsts)
        self.frame = self.firsts[self.turn].cpu().numpy()               # (64, 64)
        self.film = deque([np.packbits(self.frame, axis=-1)], maxlen=self.KEEP)
        self.state = self.genie.start(self.firsts[self.turn])
        self.pressed, self.held, self.released = deque(maxlen=30), None, False
        self.last, self.speed, self.note = time.monotonic(), 0.0, ""
        self.look_ahead()

    def look_ahead(self):
        """Sketch the frames (num_actions, 64, 64) that the buttons would lead to."""
        self.futures = sketch(self.genie, self.state).cpu().numpy()

    def tick(self):
        """One frame on: by the button that is held, or by the one that moves things least."""
        action = self.arrows[" "] if self.held is None else self.held
        if self.released:                                # a short tap counts for one frame
            self.held, self.released = None, False
        frame, self.state = self.genie.step(self.state, action, self.generator)
        self.frame = frame[0].cpu().numpy()
        self.film.append(np.packbits(self.frame, axis=-1))
        self.pressed.append(action)
        self.look_ahead()
        now = time.monotonic()
        rate = 1 / max(1e-6, now - self.last)
        self.last, self.speed = now, 0.9 * self.speed + 0.1 * rate if self.speed else rate
        self.draw()

    def picture(self):
        """The frame, enlarged to the width of all the futures in a row; and these under it."""
        n = len(self.buttons)
        large = np.pad(self.frame.repeat(n, 0).repeat(n, 1) * 255, ((0, 2), (n, n)))
        return np.concatenate([large, beside(list(self.futures * 255))])

    def lay_out(self):
        """Make the artists; draw() then only changes what they show."""
        axes, n = self.figure.add_axes((0.02, 0.13, 0.96, 0.82)), len(self.buttons)
        axes.set_axis_off()
        self.image = axes.imshow(in_colour(self.picture()), interpolation="nearest")
        signs = {"up": "↑", "down": "↓", "left": "←", "right": "→", " ": "space"}
        for a in range(n):
            names = [str(a)] + [signs[key] for key, action in self.arrows.items() if action == a]
            axes.text(66 * a + 32, 64 * n + 72, "\n".join(names), ha="center", va="top")
        self.title = self.figure.text(0.02, 0.96, "")
        self.history = self.figure.text(0.02, 0.04, "")
        self.figure.text(0.02, 0.01, self.HELP)
        self.draw()

    def draw(self):
        self.image.set_data(in_colour(self.picture()))
        self.title.set_text(f"{self.speed:.1f} frames a second   {self.note}")
        self.history.set_text("pressed: " + " ".join(map(str, self.pressed)))
        self.figure.canvas.draw_idle()

    def on_key(self, event):
        key = (event.key or "").lower()
        if key in self.keys:
            self.held, self.released = self.keys[key], False
        elif key in ("r", "s", "q"):
            {"r": self.restart, "s": self.save, "q": self.close}[key]()

    def on_release(self, event):
        if self.keys.get((event.key or "").lower()) == self.held:
            self.released = True                         # the next tick still sees it

    def save(self):
        """Write what was played as dream-1.gif, or the next number that is free."""
        path = next(p for n in itertools.count(1) if not (p := Path(f"dream-{n}.gif")).exists())
        try:
            save_gif(np.unpackbits(np.stack(self.film), axis=-1), path)
            self.note = f"saved {path}"
        except (UserError, OSError) as error:            # the dream goes on
            self.note = f"not saved: {error}"


def open_window(args, genie):
    """Play in a window. Raises UserError where matplotlib can open none."""
    plt, firsts = screen(), first_frames(args, genie)
    motion, changed, _ = button_motion(genie, firsts)
    arrows = arrow_keys(motion, changed)
    window = Window(genie, firsts, arrows, gm.seeded(args.seed))
    print(window.HELP)
    plt.show()                                           # until the window is closed


def held_buttons(genie, steps=gm.CLIP - 1):
    """The plan (num_actions, steps) that holds down each button: the quickest look at a world."""
    return torch.arange(genie.config.num_actions)[:, None].expand(-1, steps)


def parse_actions(text, num_actions):
    """'0,1,1,7' -> [0, 1, 1, 7]. Raises UserError for anything that is no button."""
    try:
        actions = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--actions {text[:40]!r}: give whole numbers with commas between, such as"
                        " 0,1,1,2") from None
    if not all(0 <= a < num_actions for a in actions):
        raise UserError(f"--actions {text[:40]}: the buttons are 0 to {num_actions - 1}")
    if len(actions) > 3000:
        raise UserError(f"--actions names {len(actions)} buttons: a GIF of over 3000 frames (five"
                        " minutes) would fill the memory")
    return actions


def first_frames(args, genie, others=16):
    """Frames (n, 64, 64) that play may start from: --image alone, or frame 1 of sequence --start
    and then of some others. Raises UserError."""
    if args.image is not None:
        if args.start is not None:
            raise UserError("--image and --start both name a first frame: give one of them")
        data = Path(args.data or genie.trained_on)                      # black and white as there
        meta = files.load_meta(data) if data.is_file() else None
        return torch.from_numpy(data_prep.image_to_frame(args.image, meta))[None]
    data = gm.Sequences(find_data(args.data, genie.trained_on), args.split)
    start = args.start or 0
    if not 0 <= start < len(data):
        raise UserError(f"--start {start}: the {args.split} split has 0 to {len(data) - 1}")
    return data.frames([start, *gm.spread(data, others)])[:, 0]


def play(args):
    """`play`: in a window; with --actions or --out, to a GIF of those buttons, or of each held."""
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}: it cannot be negative")
    genie = load_run(args)
    if args.actions is None and args.out is None:
        return open_window(args, genie)
    out = files.check_output(args.out or "roll.gif", (".gif",), args.force)
    plan = held_buttons(genie)
    if args.actions is not None:
        plan = torch.tensor([parse_actions(args.actions, genie.config.num_actions)])
    first = first_frames(args, genie)[:1].expand(len(plan), gm.SIZE, gm.SIZE)
    genie.rollout(first, plan[:, :2], gm.seeded(args.seed))             # to warm up
    began = time.monotonic()
    made = genie.rollout(first, plan, gm.seeded(args.seed)).cpu()       # (plans, T, H, W)
    speed = plan.numel() / (time.monotonic() - began)
    panels = torch.cat([first[:, None], made], dim=1).numpy() * 255
    if len(plan) == 1:
        save_gif(panels[0], out)
    else:
        titles = [titled(panel, f"button {a}") for a, panel in enumerate(panels)]
        save_gif(beside(titles), out, scale=2)
    print(f"{out}: {plan.shape[1]} steps of {len(plan)} dream(s), {speed:.1f} frames a second")
