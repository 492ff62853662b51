"""The demo worlds: games whose actions are known.

To see whether a model has found the actions of a world, one must know them.
Hardly any public video comes with its key presses, so here is a game: a hero walks among brick
walls where the player sends it, and a fish swims to and fro by its own rule, ignoring the player.

It is built to be learnt on a CPU in minutes. The tokenizer cuts the screen into 16x16 patches
of 4x4 pixels, and the game is played on that grid, as old tile games were: ten times a second
hero and fish move by one patch, or stay. So each of the model's frames (10 FPS) shows one move
more than the last, whole; a move shifts tokens by one place and leaves them unchanged; and a
press does its all or, where the way is blocked, nothing. 29 different 4x4 patches appear. (The
price: of a window's three staggered sequences two show the same pictures.)

All of its state is in sight. So there is a second world, whose balls fly in a direction that only
a model with memory can know, and in which all goes by half a patch: BallWorld.
"""

import numpy as np

from data_prep import cut_window, split_sizes, true_actions
from extras.files import (FRAMES, SIZE, SOURCE_FPS, STRIDE, WINDOW, Progress, UserError,
                          check_output, save_dataset)

DEMO_ACTIONS = ("stay", "up", "down", "left", "right")
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))     # (dy, dx) in patches, same order
PATCHES = 16                        # patches along a side of the screen
BODY = 2                            # hero and fish are 2 patches = 8 pixels square
LEVEL = 10 * WINDOW                 # source frames until the next level: see DemoWorld
REST, FOLLOW = 0.05, 0.3            # how often the player rests; how often it goes for the fish


def sprite(*rows):
    """Read a drawing of '#' (1) and '.' (0) into a uint8 array."""
    return np.array([[pixel == "#" for pixel in row] for row in rows], dtype=np.uint8)


HERO = sprite(".######.",           # mirror-symmetric: its picture never tells where it goes
              "########",
              "#..##..#",
              "#..##..#",
              "########",
              "########",
              "##....##",
              "##....##")
FISH_RIGHT = sprite("........",     # the fish's picture does tell: the tail is behind
                    "#..####.",
                    "#.###.##",
                    "########",
                    "########",
                    "#.######",
                    "#..####.",
                    "........")
FISH_LEFT = FISH_RIGHT[:, ::-1]
BALL = sprite(".##.", "####", "####", ".##.")
# What walls are built of, 2x2 patches each: brick, stone, crates and hedge.
WALLS = (sprite("#######.",
                "#######.",
                "#######.",
                "........",
                "##.#####",
                "##.#.###",
                "##.#####",
                "........"),
         sprite(".##..###",
                "####.###",
                "####..##",
                ".##.....",
                "....###.",
                "##.#####",
                "##.#####",
                "#...###."),
         sprite("########",
                "##....##",
                "#.#..#.#",
                "#..##..#",
                "#..##..#",
                "#.#..#.#",
                "##....##",
                "########"),
         sprite("#.#..#.#",
                ".##.#.##",
                "#.###.#.",
                "##.#.###",
                ".#.##.#.",
                "###.#.##",
                "#.##.#.#",
                ".#.#.##."))
# Sizes of the inner blocks, (height, width) in patches.
BLOCKS = ((2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3))


def random_walls(rng):
    """A random map of walls, int (16, 16) in patches: a border of 1 and 3 to 5 inner blocks.

    0 is floor, another number what the wall is built of: WALLS[number - 1]. The gap between a
    block and the border is none or at least 3 patches, and that between two blocks at least 3.
    The hero is 2 patches wide, so it fits through every gap: no traps.
    """
    walls = np.ones((PATCHES, PATCHES), dtype=int)
    walls[1:-1, 1:-1] = 0
    near = np.zeros_like(walls, dtype=bool)     # where the next block may not stand
    placed, wanted = 0, rng.integers(3, 6)
    for _ in range(60):             # some maps have no room for all: after 60 tries, so be it
        height, width = BLOCKS[rng.integers(len(BLOCKS))]
        y, x = rng.integers(1, PATCHES - height), rng.integers(1, PATCHES - width)
        gaps = (y - 1, PATCHES - 1 - y - height, x - 1, PATCHES - 1 - x - width)
        if any(0 < gap < 3 for gap in gaps) or near[y:y + height, x:x + width].any():
            continue
        walls[y:y + height, x:x + width] = rng.integers(1, len(WALLS) + 1)
        near[max(0, y - 3):y + height + 3, max(0, x - 3):x + width + 3] = True
        placed += 1
        if placed == wanted:
            break
    return walls


def overlap(a, b):
    """Whether two bodies at patches (y, x) share a patch."""
    return all(abs(p - q) < BODY for p, q in zip(a, b))


class DemoWorld:
    """The game, stepped by hand: frame() shows it, step(key) moves it on by 1/30 s.

    Every 480 steps a new random level begins. 480 steps are 10 windows: a cut between levels
    always falls on the border of two windows, so no training sequence has a cut inside.
    """

    def __init__(self, seed):
        """seed: a non-negative integer; the same seed and keys give the same game."""
        self.rng = np.random.default_rng(seed)
        self.ticks = 0
        self.new_level()

    def new_level(self):
        """Draw new walls, and places for hero and fish, from the random generator."""
        self.walls = walls = random_walls(self.rng)
        # A tile covers 2x2 patches: 8 tiles a side; a wall's patches are cut out of them.
        tiles = np.stack([np.zeros_like(HERO), *WALLS])                         # (5, 8, 8)
        tiled = np.tile(tiles, (PATCHES // 2, PATCHES // 2))                    # (5, 64, 64)
        built = walls.repeat(4, 0).repeat(4, 1)                                 # (64, 64)
        self.background = np.take_along_axis(tiled, built[None], axis=0)[0]
        # free[y, x]: does a body at patch (y, x) miss every wall? (16, 16) -> (15, 15)
        boxes = np.lib.stride_tricks.sliding_window_view(walls, (BODY, BODY))
        self.free = ~boxes.any(axis=(2, 3))
        # The fish wants 6 patches of water in a row: 5 places, all free.
        spots = [(int(y), int(x)) for y, x in np.argwhere(self.free)]
        lanes = [(y, x) for y, x in spots if x >= 2 and self.free[y, x - 2:x + 3].sum() == 5]
        self.fish = lanes[self.rng.integers(len(lanes))]
        spots = [spot for spot in spots if not overlap(spot, self.fish)]
        self.hero = spots[self.rng.integers(len(spots))]
        self.fish_dx = int(self.rng.choice((-1, 1)))

    def moved(self, body, move, other):
        """Where body (y, x) is after a move (dy, dx): where it was, if a wall or other is there."""
        target = (body[0] + move[0], body[1] + move[1])
        blocked = not self.free[target] or overlap(target, other)
        return body if blocked else target

    def is_free(self, key):
        """Does this key move the hero, or is something in his way?"""
        return self.moved(self.hero, MOVES[key], self.fish) != self.hero

    def move(self, effect):
        """Move hero and fish by a patch; he goes first."""
        self.hero = self.moved(self.hero, MOVES[effect], self.fish)
        fish = self.moved(self.fish, (0, self.fish_dx), self.hero)
        if fish == self.fish:
            self.fish_dx = -self.fish_dx                        # to turn takes the whole move
        self.fish = fish

    def step(self, key):
        """Hold a key (0 to 4, see DEMO_ACTIONS) for 1/30 s. Returns what the hero really does.

        A move takes three steps: the first reads the key, the second shows the result. A hero that
        is blocked stays, so its effect is 0 whatever the key.
        """
        if self.ticks % STRIDE == 0:
            self.effect = int(key) if self.is_free(key) else 0
        elif self.ticks % STRIDE == 1:
            self.move(self.effect)
        effect = self.effect
        self.ticks += 1
        if self.ticks % LEVEL == 0:
            self.new_level()
        return effect

    def leads_to_corner(self, key):
        """Does this key (1 to 4) end at a corner, which blocks half of the hero, not at a wall?"""
        (y, x), (dy, dx), walls = self.hero, MOVES[key], 0
        while not walls:
            y, x = y + dy, x + dx
            walls = np.count_nonzero(self.walls[y:y + BODY, x:x + BODY])
        return walls == 1

    def choose_key(self):
        """What the player in our video presses next: a key whose way is free, at random.

        Seldom 'stay', often the one that leads to the fish, and else one that leads to a corner, if
        any does: a still hero teaches little, where bodies meet there is most to learn, and without
        such a will corners are met so seldom that dreams break there.
        """
        keys = [key for key in range(1, len(MOVES)) if self.is_free(key)]
        dy, dx = self.fish[0] - self.hero[0], self.fish[1] - self.hero[1]
        along = (0, np.sign(dx)) if abs(dx) > abs(dy) else (np.sign(dy), 0)     # the longer gap
        luck = self.rng.random()
        if not keys or luck < REST:
            return 0
        if luck < REST + FOLLOW and MOVES.index(along) in keys:
            return MOVES.index(along)
        keys = [key for key in keys if self.leads_to_corner(key)] or keys
        return keys[self.rng.integers(len(keys))]

    def frame(self):
        """Draw the world: uint8 (64, 64) of 0 and 1."""
        picture = self.background.copy()
        bodies = ((self.hero, HERO), (self.fish, FISH_RIGHT if self.fish_dx > 0 else FISH_LEFT))
        for (y, x), drawing in bodies:
            y, x = 4 * y, 4 * x
            picture[y:y + 8, x:x + 8] = drawing     # a body's box is never over a wall
        return picture


class BallWorld(DemoWorld):
    """A game that needs memory: balls fly through a hall and bounce off its walls, and no single
    frame shows which way. All goes by 2 pixels a move, half a patch. The hero passes before a ball.
    """

    def __init__(self, seed, balls=1):
        self.balls = balls
        super().__init__(seed)

    def new_level(self):
        """Draw what the walls are built of, and places for hero and balls, which fly diagonally."""
        self.background = np.tile(WALLS[self.rng.integers(len(WALLS))], (8, 8))     # (64, 64)
        self.background[4:-4, 4:-4] = 0
        self.hero = 2 * self.rng.integers(2, 27, 2)             # (y, x) in pixels: 4 to 52
        self.at = 2 * self.rng.integers(2, 29, (self.balls, 2))     # and 4 to 56: BALL is 4 x 4
        self.speed = self.rng.choice((-2, 2), (self.balls, 2))

    def is_free(self, key):
        target = self.hero + 2 * np.array(MOVES[key])
        return key > 0 and bool((target >= 4).all() and (target <= 52).all())

    def move(self, effect):
        self.hero = self.hero + 2 * np.array(MOVES[effect])
        target = self.at + self.speed
        self.speed = np.where((target < 4) | (target > 56), -self.speed, self.speed)
        self.at = self.at + self.speed

    def choose_key(self):
        keys = [key for key in range(1, len(MOVES)) if self.is_free(key)]
        return 0 if self.rng.random() < 0.1 else keys[self.rng.integers(len(keys))]

    def frame(self):
        picture = self.background.copy()
        for y, x in self.at:
            picture[y:y + 4, x:x + 4] |= BALL
        y, x = self.hero
        picture[y:y + 8, x:x + 8] = HERO
        return picture


WORLDS = {"demo": DemoWorld, "ball": BallWorld,                 # crowd: eight balls hide the hero
          "crowd": lambda seed: BallWorld(seed, balls=8)}


def is_ball_near(frames, places, radius=2):
    """Is there a ball within `radius` pixels of its place? frames (S, 64, 64) of 0/1, places (S, 2)
    as (y, x) -> (S,) bool. One wrong pixel is forgiven; a wall or a hero is no ball."""
    boxes = np.lib.stride_tricks.sliding_window_view(frames, BALL.shape, axis=(-2, -1))
    found = (boxes != BALL).sum((-2, -1)) <= 1                          # (S, 61, 61)
    return np.array([found[i, max(0, y - radius):y + radius + 1,
                           max(0, x - radius):x + radius + 1].any()
                     for i, (y, x) in enumerate(places)], dtype=bool)


def find_balls(frames):
    """Where real frames (S, 64, 64) of the ball world show the ball: (S, 2) as (y, x), and (S,)
    bool whether it is to be seen whole, not behind the hero."""
    hall = frames.copy()
    hall[:, [*range(4), *range(60, 64)], :] = hall[:, :, [*range(4), *range(60, 64)]] = 0
    boxes = np.lib.stride_tricks.sliding_window_view(hall, HERO.shape, (-2, -1), writeable=True)
    boxes[(boxes == HERO).all((-2, -1))] = 0
    boxes = np.lib.stride_tricks.sliding_window_view(hall, BALL.shape, (-2, -1))
    found = (boxes == BALL).all((-2, -1)).reshape(len(hall), -1)        # (S, 61 * 61)
    return np.stack(np.divmod(found.argmax(1), 61), axis=1), found.any(1)


def count_sprites(frames, drawings, tolerance=4):
    """In how many places of each frame one of these drawings stands: frames (..., 64, 64) of 0/1 ->
    (...) int. A place counts if at most `tolerance` of its 8x8 pixels differ."""
    boxes = np.lib.stride_tricks.sliding_window_view(frames, HERO.shape, axis=(-2, -1))
    return sum(((boxes != drawing).sum((-2, -1)) <= tolerance).sum((-2, -1))
               for drawing in drawings)


def count_heroes(frames):
    """How many heroes each frame shows: frames (..., 64, 64) of 0/1 -> (...) int."""
    return count_sprites(frames, [HERO])


def count_fish(frames):
    """How many fish each frame shows, whichever way they look: (..., 64, 64) -> (...) int."""
    return count_sprites(frames, [FISH_LEFT, FISH_RIGHT])


def demo_walls(frames):
    """Real frames of the demo world (..., 64, 64) with hero and fish blanked: the walls alone."""
    walls = frames.copy()
    for drawing in (HERO, FISH_LEFT, FISH_RIGHT):
        boxes = np.lib.stride_tricks.sliding_window_view(walls, HERO.shape, (-2, -1),
                                                         writeable=True)
        boxes[(boxes == drawing).all((-2, -1))] = 0                     # no body overlaps a wall
    return walls


def render_demo(windows, seed, name="demo"):
    """Play a demo world, keys as choose_key has them, for a number of 1.6 s windows.

    Returns bits uint8 (3 * windows, 16, 64, 8) and actions uint8 (3 * windows, 15); the sequences
    of window w are 3w, 3w + 1 and 3w + 2. A key is held for 9 to 24 source frames: a transition
    that straddles a change of key has no single action, so changes should be rare.
    """
    world = WORLDS[name](seed)
    bits = np.empty((windows, STRIDE, FRAMES, SIZE, SIZE // 8), dtype=np.uint8)
    actions = np.empty((windows, STRIDE, FRAMES - 1), dtype=np.uint8)
    frames = np.empty((WINDOW, SIZE, SIZE), dtype=np.uint8)
    progress = Progress("rendering", windows)
    key, hold = 0, 0
    for w in range(windows):        # packed window by window: memory stays that of the result
        effects = []
        for k in range(WINDOW):
            if hold == 0:
                key, hold = world.choose_key(), STRIDE * int(world.rng.integers(3, 9))
            frames[k] = world.frame()
            effects.append(world.step(key))
            hold -= 1
        bits[w] = cut_window(np.packbits(frames, axis=-1))
        actions[w] = true_actions(effects)
        progress.update(w + 1)
    progress.close()
    return bits.reshape(-1, *bits.shape[2:]), actions.reshape(-1, FRAMES - 1)


def write_demo(path, minutes=60, seed=0, force=False, world="demo"):
    """Render a demo world and write it as a data file: the `demo` command.

    60 minutes make exactly 6,000, 450 and 300 sequences. Raises UserError for bad arguments.
    """
    path = check_output(path, (".npz",), force)
    if not 0.08 <= minutes <= 6000:                 # also false for NaN
        raise UserError("--minutes must be a number from 0.08 (three windows) to 6000")
    if seed < 0:
        raise UserError("--seed must not be negative")
    windows = round(minutes * 60 * SOURCE_FPS) // WINDOW
    bits, actions = render_demo(windows, seed, world)
    start = np.arange(windows)[:, None] * WINDOW + np.arange(STRIDE)      # (windows, 3)
    start = start.reshape(-1).astype(np.int64)
    splits, low = {}, 0
    for name, size in split_sizes(windows).items():
        part = slice(low, low + STRIDE * size)
        splits[name] = {"bits": bits[part], "start": start[part], "actions": actions[part]}
        low = part.stop
    save_dataset(path, splits, {
        "sources": [{"name": f"{world} world", "seed": seed, "offset": 0,
                     "ticks": windows * WINDOW}],
        "threshold": None, "crop": None, "invert": False, "action_names": DEMO_ACTIONS})
