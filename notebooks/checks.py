"""Checks of the notebooks' exercises: each takes a student's function, tells right from wrong on
cases worked out by hand or by genie_mini itself, and says in one sentence what to look at.

A check raises NotYet, with its advice, unless the function is right. `exercise` makes of it what
the notebooks call: it prints the verdict and returns True or False. So an exercise that was not
begun (its stub returns None) is no error: the notebooks run from top to bottom as they are.
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep                                                        # noqa: E402
import genie_mini                                                       # noqa: E402
from extras import files                                                # noqa: E402


class NotYet(Exception):
    """What to look at, in a sentence or two."""


def exercise(check):
    """Make of a check, which raises NotYet, one that prints its verdict and returns it."""
    @functools.wraps(check)
    def told(student):
        try:
            check(student)
        except NotYet as advice:
            print(f"Not yet: {advice}")
            return False
        print("Right.")
        return True
    return told


def refuse(wrong, advice):
    """Raise NotYet if something is wrong."""
    if wrong:
        raise NotYet(advice)


def answer(student, *given, case="", index="", kept=""):
    """What the student's function returns for copies of what is given, never None.

    case: which of several this is. What to say, too, of an IndexError: index; if it changes what it
    is given: kept.
    """
    copies = copy.deepcopy(given)
    try:
        got = student(*copies)
    except Exception as error:
        raise NotYet(f"{case}your function raised {type(error).__name__}: {error}"
                     + index * isinstance(error, IndexError)) from None
    refuse(got is None, "write the function first.")
    refuse(kept and not all(map(same, given, copies)), kept)
    return got


def number(student, *given, **options):
    """The answer as a float."""
    got = answer(student, *given, **options)
    try:
        return float(got)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"return one number; this is a {type(got).__name__}.") from None


def tensor(student, shape, *given, **options):
    """The answer as a tensor of this shape."""
    got = answer(student, *given, **options)
    refuse(not torch.is_tensor(got), f"return a tensor; this is a {type(got).__name__}.")
    refuse(got.shape != shape, f"{options.get('case', '')}the shape should be {tuple(shape)}; yours"
           f" is {tuple(got.shape)}.")
    return got.detach()


def same(a, b):
    """Are two numbers, lists, arrays or tensors equal, but for rounding?"""
    a, b = (np.asarray(x, float) for x in (a, b))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-5)


def judge(got, right, wrongs, otherwise):
    """Raise NotYet unless got is right. wrongs: what a typical mistake gives, and the advice."""
    if same(got, right):
        return
    for wrong, advice in wrongs:
        refuse(same(got, wrong), advice)
    raise NotYet(otherwise)


def shown(x):
    """Numbers for a sentence, with three digits after the point."""
    return np.round(np.asarray(x, float), 3).tolist()


@exercise
def opposite(student):
    """00: opposite(motion (A, 2), button) -> the button that moves most against it."""
    motion = torch.tensor([[0.1, 3.0], [2.4, -0.2], [0.0, -2.5], [0.0, 0.1], [-2.2, 0.1],
                           [-1.9, -3.2]])                               # 5 is far from 1
    right = {1: 4, 2: 0, 4: 1, 5: 0}

    def by(rule):
        return [int(rule(motion[button])) for button in right]

    got = [int(number(student, motion, button)) for button in right]
    judge(got, list(right.values()), (
        (list(right), "you return the button itself, whose dot product is the largest. The"
         " opposite's is the most negative: argmin."),
        (by(lambda own: (motion @ own).abs().argmin()), "you return what goes at a right angle or"
         " stands still: its dot product is near 0. Take no absolute value."),
        (by(lambda own: (motion - own).norm(dim=1).argmax()), "you return the farthest motion. A"
         " long one that goes aside wins then: take the dot product."),
        *((by(lambda own: (motion[:, axis] * own[axis]).argmin()), f"you look at {name} alone. The"
           " dot product of two rows sums over both"
           " axes.") for axis, name in enumerate(("dy", "dx")))),
        f"the opposites of the buttons {list(right)} are {list(right.values())}, not {got}, where"
        f" the motions are {shown(motion)}. Compare these rows by their dot product with"
        " motion[button].")


@exercise
def turn(student):
    """00: turn(was, now, button, ways) -> the same button while the hero moves, else the next."""
    ways = [3, 0, 6, 1]
    right, left = ways[1:] + ways[:1], ways[-1:] + ways[:-1]

    def press(was, now, button):
        return answer(lambda *given: [student(*given)], was, now, button, ways,
                      case=f"for was {was}, now {now}, button {button}, ways {ways} ",
                      index="; after the last comes the first again, so take the place modulo"
                      " len(ways)")[0]

    went = [press((8, 8), (8, 12), button) for button in ways]
    stood = [press((8, 8), (8, 8), button) for button in ways]
    blind = [press(*places, 6) for places in ((None, None), ((8, 8), None), (None, (8, 8)))]
    every = went + stood + blind
    for wrong, advice in (
            (all(button is None for button in every), "write the function first."),
            (went != ways and stood == ways, "the test of was against now is the wrong way round:"
             " it turns while the hero moves."),
            (None in every, "in some case it returns None: every path must return a button."),
            (went == [0, 1, 2, 3], "it returns the place in the list: return ways[place]."),
            (went != ways, "the hero moved and still the button changed."),
            (stood == ways, "was == now, and it presses on against the wall."),
            (stood == left, "it turns left. The list is clockwise, so right is the next one: + 1."),
            (any(button not in ways for button in stood)
             or stood == [ways[(button + 1) % 4] for button in ways], "it counts on from the"
             " button's number: count on from its place, ways.index(button)."),
            (stood != right, f"blocked with each of {ways} in turn, it presses {stood}; to turn"
             f" right is {right}."),
            (blind != [6, 6, 6], "None == None is no standing hero: ask for None first.")):
        refuse(wrong, advice)


def film_to_keep():
    """A film in grey and in black and white, (5, 64, 64) each, on which typical mistakes differ."""
    rng = np.random.default_rng(0)
    grey = np.full((5, 64, 64), 100, np.uint8)
    grey[:, 50:] += rng.integers(0, 13, (5, 14, 64), dtype=np.uint8)    # noise, up to 12 levels
    binary = (rng.random(grey.shape) < 0.02).astype(np.uint8)           # flicker
    for t in range(5):
        grey[t, 4:10, 4 * t:4 * t + 8], grey[t, 14:20, 40 - 5 * t:48 - 5 * t] = 220, 60
        grey[t, 24:30, 4 * t:4 * t + 8], grey[t, 34:44, 2 * t:2 * t + 6] = 121, 160
        binary[t, 3:9, 4 * t + 1:4 * t + 9] = 1                         # one pixel too far
        binary[t, 14:20, 39 - 5 * t:47 - 5 * t] = 1
        binary[t, 34:44, 2 * t:2 * t + 6], binary[t, 30:50, 63] = 1, t % 2
    return grey, binary


@exercise
def motion_kept(student):
    """01: motion_kept(grey, binary): the share of grey change that has a binary one beside it."""
    grey, binary = film_to_keep()
    spread, flips = data_prep.spread, binary[1:] != binary[:-1]
    step, wrapped = np.diff(grey.astype(int), axis=0), np.diff(grey, axis=0)
    change, near = abs(step), spread(flips)
    moves, weight = change > 8, change * (change > 8)
    around = [np.roll(flips, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]

    def share(weight, beside=near):
        return (weight * beside).sum() / weight.sum()

    kept, right = (weight * near).sum(), share(weight)
    no_weights = ("you count pixels: sum the changes, of which 100 levels weigh ten times 10.")
    no_neighbours = ("a binary change one pixel beside is near enough: spread them first.")
    by_binary = ("you divide by the binary changes: the sum of grey change stands below.")
    wraps = "in uint8, 3 - 5 is 254: turn grey into int before you subtract."
    below = "changes of up to 8 levels are noise, and count neither above nor below the line."
    true = "that is 'true', the other number: of the binary changes, those with a grey one near."
    no_abs = "what gets darker has changed as well: take abs() of the difference."
    excess = "a change of 9 levels weighs 9, not what exceeds 8; one of 8 weighs 0."
    white = "what stands still is white as well: compare each picture with the one before."
    got = number(student, grey, binary)
    judge(got, right, (
        (share(moves), no_weights),
        (share(weight, flips), no_neighbours),
        (share(moves, flips), no_weights + " Besides, " + no_neighbours),
        (kept / flips.sum(), by_binary),
        ((moves & near).sum() / flips.sum(), by_binary + " Besides, " + no_weights),
        ((weight * flips).sum() / flips.sum(), by_binary + " Besides, " + no_neighbours),
        (kept / near.sum(), by_binary),
        *((share(flips, spread(change > k)), true) for k in (4, 8)),
        ((spread(weight) * flips).sum() / weight.sum(), "you spread the grey change: spread the"
         " binary one, which may be one pixel away."),
        *((share(w), wraps) for w in (wrapped * (wrapped > 8), wrapped.astype(int))),
        (share(change), below), (kept / change.sum(), below),
        *((share(w), no_abs) for w in (step * (step > 8), -step * (step < -8))),
        *((share(w), excess) for w in ((change - 8).clip(0), change * (change >= 8))),
        *((share(weight, spread(b)), white) for b in (binary[1:], binary[:-1])),
        (share(weight, around[1] | around[3] | around[4] | around[5] | around[7]), "all eight"
         " neighbours are near."),
        (share(weight, np.any(around, axis=0)), "np.roll makes neighbours of the two edges: pad, or"
         " use spread()."),
        (np.mean([share(*pair) for pair in zip(weight, near)]), "you average over the steps. Sum"
         " over all of them first, and divide once."),
        (share(weight, spread(np.diff(binary, axis=0))), "in uint8, 0 - 1 is 255: compare"
         " successive pictures with !=."),
        (1 - right, "that is the share that is lost."),
        (100 * right, "return a share from 0 to 1, not a percentage."),
        (kept, "divide it by the sum of all grey change.")),
        f"on the film of this check {right:.3f} is kept, and you return {got:.3f}. Above the line:"
        " the weights (grey changes over 8) of the pixels with a binary change within one pixel."
        " Below it: all weights.")


@exercise
def staggered(student):
    """01: staggered(frames (T, ...), stride): deal them out to `stride` sequences."""
    for shape, stride in (((48,), 3), ((12, 2, 5), 2), ((20, 3), 5)):
        case = f"on frames of shape {shape} with stride={stride} "
        frames = np.arange(np.prod(shape)).reshape(shape)
        right = frames.reshape(-1, stride, *shape[1:]).swapaxes(0, 1)
        try:
            got = np.asarray(answer(student, frames, stride, case=case))
        except ValueError:
            raise NotYet("the sequences are not equally long, so they form no array. Each has T //"
                         f" stride frames: offsets 0 to {stride - 1}, to the end.") from None
        refuse(got.shape == right.swapaxes(0, 1).shape != right.shape, "swap the first two axes:"
               " the sequences come first, then the frames of each.")
        refuse(got.shape != right.shape, f"frames {shape} with stride={stride} must give"
               f" {right.shape}, not {got.shape}: stride sequences of T // stride frames, and what"
               " follows the first axis stays as it is.")
        judge(got, right, (
            (frames.reshape(right.shape), "each sequence holds neighbouring frames. The next frame"
             " of a sequence is `stride` later: see the rows of section 6."),
            (right[::-1], "in reverse order: the first is the one with offset 0.")),
            f"the shape is right, the frames are not. With stride={stride}, sequence 1 should begin"
            f" with frames 1, {1 + stride}, {1 + 2 * stride}.")


@exercise
def split_by_time(student):
    """01: split_by_time(start (S,), share): the test split is the last whole windows, in time."""
    rng = np.random.default_rng(0)
    for numbers, share in ((np.arange(20), 0.2), (np.append(np.arange(20), [27, 28, 29]), 0.2),
                           (np.arange(12), 0.01), (np.arange(7), 0.45)):
        start = (numbers[:, None] * files.WINDOW + np.arange(files.STRIDE)).ravel()
        start = rng.permutation(start)
        window, count = start // files.WINDOW, max(1, round(share * len(numbers)))
        case = f"with {len(numbers)} windows and share={share} "
        got = np.asarray(answer(student, start, share, case=case))
        refuse(got.shape != start.shape or got.dtype != bool, "return one bool for each sequence,"
               f" shape {start.shape}; this is {got.dtype} of shape {got.shape}.")
        refuse(not got.any(), f"{case}nothing is in test: at least one window must be.")
        torn = len(set(window[got]) & set(window[~got]))
        refuse(torn > 0, f"{case}{torn} window(s) have sequences on both sides: that is the leak of"
               " section 8. Decide by start // 48, not by the place in the array.")
        refuse(got.all(), f"{case}all is in test. A slice [-0:] takes everything: round may give"
               " 0.")
        refuse(window[got].min() < window[~got].max(), f"{case}training windows come after the test"
               " split. Mind that `start` is in any order.")
        refuse((got != (window >= numbers[-count])).any(), f"{case}the last {len(set(window[got]))}"
               f" windows are in test, not {count}. Some may be missing from the file: count those"
               " that are there, not ticks.")


@exercise
def cut_patches(student):
    """02: cut_patches(frames (B, T, H, W), patch) -> patches (B, T, N, P)."""
    for shape, patch in (((1, 1, 4, 4), 2), ((2, 3, 8, 12), 4)):
        B, T, H, W = shape
        frames = torch.arange(B * T * H * W).view(shape)
        right = genie_mini.patchify(frames, patch)                      # (B, T, N, P)
        got = tensor(student, right.shape, frames, patch, case=f"on frames {shape} with"
                     f" patch={patch} ")
        judge(got, right, (
            (frames.reshape(right.shape), "each patch is a strip of one row of pixels: reshape"
             " keeps the order of the memory. Split both sides into (which patch, where in it), and"
             " permute before you flatten."),
            (right.unflatten(2, (H // patch, W // patch)).transpose(2, 3).flatten(2, 3), "the"
             " patches come column by column. Row by row is what the rotary angles of STBlock count"
             " on: patch 1 is to the right of patch 0, not under it."),
            (right.unflatten(3, (patch, patch)).transpose(3, 4).flatten(3), "in each patch the"
             " pixels come column by column. Look at the last two axes of the permute.")),
            f"the shape is right, the pixels are not. For frames {shape} the first patch should"
            f" hold {right[0, 0, 0].tolist()}, and it holds {got[0, 0, 0].tolist()}.")


@exercise
def causal_weights(student):
    """02: causal_weights(scores (T, T)) -> causal attention weights (T, T)."""
    scores = torch.tensor([[0.3, 2.0, -1.0, 0.5], [1.0, -0.5, 3.0, 0.0],
                           [-1.0, 0.7, 0.2, 2.5], [0.4, -2.0, 1.1, 0.9]])
    later = torch.ones(4, 4).triu(1).bool()
    hidden = scores.masked_fill(later, -torch.inf)
    right = hidden.softmax(-1)
    got = tensor(student, (4, 4), scores)
    refuse(torch.isnan(got).any(), "there is a NaN: some row has no score left but minus infinity."
           " A frame sees itself, so mask only what is later (triu(1), not triu(0)).")
    otherwise = (f"row 1 should be {shown(right[1])}, and is {shown(got[1])}. Is it"
                 " softmax(scores), without any further scaling?")
    if not same(got.sum(-1), torch.ones(4)):
        otherwise = "the rows do not sum to 1: take the softmax over what each frame may see."
    if got.triu(1).abs().max() > 1e-6:
        otherwise = "there is weight above the diagonal: some frame sees a later one."
    judge(got, right, (
        (scores.softmax(-1), "nothing is masked: frame 0 looks at later ones."),
        (scores.masked_fill(later, 0).softmax(-1), "a masked score of 0 is no zero weight: exp(0) ="
         " 1, so the future still has its share. The score must be minus infinity."),
        (scores.softmax(-1).masked_fill(later, 0), "mask before the softmax: after it the rows no"
         " longer sum to 1, and the later scores were in the sum."),
        (scores.masked_fill(later.T, -torch.inf).softmax(-1), "the mask is on the wrong side: row t"
         " is the frame that looks, column s what it looks at; s > t is the future."),
        (hidden.softmax(0), "the softmax runs down the columns; rows must sum to 1:"
         " dim=-1.")), otherwise)
    large = tensor(student, (4, 4), 1000 * scores, case="on large scores ")
    judge(large, (1000 * hidden).softmax(-1), (), "right for small scores, but in the thousands"
          " exp() overflows. Put minus infinity into the scores before torch.softmax.")


@exercise
def nearest_code(student):
    """03: nearest_code(z, codebook): the squared distance decides, for z of any leading shape."""
    codebook = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 1.1], [-1.0, -1.0]])
    z = torch.tensor([[1.5, 0.2], [0.1, 0.9], [-3.0, -1.0], [3.5, 0.0], [-0.2, -0.2]])
    difference = z[:, None] - codebook                                  # (M, K, L)
    distance = difference.pow(2).sum(-1)
    got = tensor(student, (5,), z, codebook)
    judge(got, distance.argmin(1), (
        (distance.argmax(1), "these are the farthest codes: take argmin."),
        ((z @ codebook.T).argmax(1), "the largest dot product is not the smallest distance: a long"
         " code wins too often. ||z - c||^2 also has the term ||c||^2."),
        (difference.abs().sum(-1).argmin(1), "you sum absolute differences: square them."),
        (difference.sum(-1).abs().argmin(1), "differences cancel each other: square them before you"
         " sum.")),
        f"for five points it should be {distance.argmin(1).tolist()}, not {got.tolist()}: the index"
        " of the smallest sum of squared differences.")
    refuse(got.is_floating_point(), "an index is a whole number, and yours are floats.")
    z, codebook = (torch.randn(*shape, generator=genie_mini.seeded(0))
                   for shape in ((2, 3, 5, 16), (7, 16)))
    got = tensor(student, (2, 3, 5), z, codebook, case="right for z (M, L), but the encoder hands"
                 " over (B, T, N, L): ")
    judge(got, torch.cdist(z.view(-1, 16), codebook).argmin(1).view(2, 3, 5), (), "right for five"
          " points with L = 2, wrong for z (B, T, N, L) with L = 16: the distance sums over the"
          " last axis, and no other.")


@exercise
def ema_step(student):
    """03: ema_step(count, total, z, indices, decay): a decayed count and sum for each code."""
    count, total = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([[2.0, 4.0], [3.0, 0.0], [1.0, 1.0]])
    z = torch.tensor([[1.0, 1.0], [3.0, 5.0], [2.0, -2.0], [5.0, 0.0]])
    indices = torch.tensor([0, 0, 1, 0])
    got = answer(student, count, total, z, indices, 0.9)
    refuse(not isinstance(got, (tuple, list)) or len(got) != 2, "return two tensors, the new count"
           " and the new total.")
    got = [tensor(lambda: part, shape) for part, shape in zip(got, ((3,), (3, 2)))]

    def joined(count, total):
        return torch.cat([count[:, None], total], dim=1)                # (K, 1 + L)

    def step(chosen, decay=0.9, new=0.1):
        return joined(decay * count + new * chosen.sum(0), decay * total + new * chosen.T @ z)

    chosen = F.one_hot(indices, 3).float()                              # (M, K)
    once = chosen * torch.tensor([0, 0, 1, 1.0])[:, None]               # z[3] overwrites the others
    mean = chosen / chosen.sum(0).clamp_min(1)
    right, used = step(chosen), chosen.sum(0)[:, None] > 0
    judge(joined(*got), right, (
        (step(chosen, 0.1, 0.9), "swapped: with 0.9, nine tenths of the *old* value stay."),
        (step(chosen, 0.9, 1.0), "weight what is new with 1 - decay."),
        (joined(step(chosen)[:, 0], step(mean)[:, 1:]), "the total takes the *sum* of the vectors,"
         " not their mean: the count divides it later."),
        (step(once), "x[indices] += z adds only one of several vectors with the same index. Use"
         " one_hot(indices).T @ z, or index_add_."),
        (torch.where(used, right, joined(count, total)), "a code that nobody chose fades too, count"
         " and sum alike: it stays where it is.")),
        f"for the test case the count should be {shown(right[:, 0])} and the total"
        f" {shown(right[:, 1:])}; yours are {shown(got[0])} and {shown(got[1])}.")


@exercise
def d2_weights(student):
    """03: d2_weights(z, codebook): squared distance to the nearest code, made to sum to 1."""
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 3.0], [5.0, 0.0], [8.0, 0.0]])
    distance = ((z[:, None] - codebook) ** 2).sum(-1)                   # (M, K)
    near, index = distance.min(1)

    def of(weights):
        return weights / weights.sum()

    got = tensor(student, (5,), z, codebook)
    nearest = ("only the *nearest* code counts: take the minimum over the codes. A vector that lies"
               " on a code must have probability 0.")
    judge(got, of(near), (
        (near, "as probabilities they must sum to 1: divide by their sum."),
        (of(near.sqrt()), "square the distances, so that far clusters win against the many points"
         " near a code."),
        (of(distance.mean(1)), nearest), (of(distance.max(1).values), nearest),
        (of(index.float()), "these are indices of codes: min(dim) returns values and indices.")),
        f"for the test case it should be {shown(of(near))}; yours is {shown(got)}.")


@exercise
def majority_accuracy(student):
    """04: majority_accuracy(latent, true): the share right after mapping codes to actions."""
    latent = np.array([2, 2, 2, 0, 0, 3, 3, 3, 3, 0])
    true = np.array([0, 0, 1, 1, 1, 0, 0, 0, 2, 1])
    got = number(student, latent, true)
    judge(got, 0.8, (
        (8, "that is how many steps are right; divide by how many there are."),
        (np.mean(latent == true), "the LAM numbers its codes as it likes: map each to an action"
         " before you compare."),
        (0.7, "take the commonest action of each code, not the other way round.")),
        f"by hand it is 0.8, not {got:.3f}: code 2 is right twice, 0 and 3 three times, of ten.")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        case = rng.integers(8, size=200), rng.integers(5, size=200)
        want, got = genie_mini.compare_actions(*case)["accuracy"], number(student, *case)
        judge(got, want, (), f"on random codes it should be {want:.3f} and is {got:.3f}: sum the"
              " largest count of each code, over all steps.")


@exercise
def pool_changed(student):
    """04: pool_changed(x, moved): the mean of the patches that moved."""
    x = torch.randn(2, 3, 6, 4, generator=genie_mini.seeded(5))
    moved = torch.rand(2, 3, 6, generator=genie_mini.seeded(6)) < 0.4
    moved[0, 0], moved[1, 2] = False, True
    moved[0, 1] = torch.tensor([True] + 5 * [False])
    total = (x * moved[..., None]).sum(2)
    right = total / moved.sum(2, keepdim=True).clamp_min(1)
    got = tensor(student, right.shape, x, moved)
    refuse(not torch.isfinite(got).all(), "a step in which nothing moved gives 0 / 0: count at"
           " least 1.")
    judge(got, right, (
        (x.mean(2), "that is the mean over all patches: the few that moved drown in it."),
        (total / 6, "you divide by all patches: divide by how many moved."),
        (total, "that is the sum: divide by how many patches moved.")),
        "some vectors are wrong: for each step, average x over the patches whose moved is True, and"
        " over no others.")


@exercise
def masked_loss(student):
    """05: masked_loss(logits, tokens, masked) -> mean cross-entropy of masked tokens, in nats."""
    draw = genie_mini.seeded(51)
    logits = torch.randn(2, 3, 6, 4, generator=draw)                    # (B, T, N, K)
    tokens = torch.randint(4, (2, 3, 6), generator=draw)
    masked = torch.rand(2, 3, 6, generator=draw) < 0.6
    masked[:, 0] = False
    each = F.cross_entropy(logits.flatten(0, 2), tokens.flatten(), reduction="none").view(2, 3, 6)
    right = each[masked].mean()
    got = number(student, logits, tokens, masked, kept="it changed what it was given. Only the"
                 " model's input is masked: the targets are the true tokens.", index=" Is 'masked'"
                 " among your targets? It is no class: they are the true tokens.")
    judge(got, right, (
        (each.mean(), "that is the mean over all tokens, but visible ones are no question: select"
         " with [masked] before the mean."),
        (each[~masked].mean(), "that is the loss of the visible tokens: True means hidden."),
        (each[masked].sum(), "that is a sum: divide by how many are masked."),
        ((each * masked).mean(), "the visible tokens are 0, but still counted in the mean."),
        (-right, "the sign is wrong: a loss is minus the log-probability."),
        (right / np.log(2), "that is in bits: use the natural logarithm.")),
        f"{got:.4f} instead of {right:.4f}. Start from F.cross_entropy(logits[masked],"
        " tokens[masked]); see DynamicsModel.loss.")


@exercise
def mask_schedule(student):
    """05: mask_schedule(N, steps) -> how many of N tokens stay masked after each of the passes."""
    by_hand = {(256, 10): [252, 243, 228, 207, 181, 150, 116, 79, 40, 0], (256, 1): [0],
               (100, 3): [86, 50, 0], (16, 4): [14, 11, 6, 0]}
    for (N, steps), right in by_hand.items():
        case = f"for N = {N}, steps = {steps} "
        got = answer(student, N, steps, case=case)
        try:
            got = np.array([float(x) for x in got])
        except (TypeError, ValueError, RuntimeError):
            raise NotYet("return a list of whole numbers.") from None
        refuse(len(got) == steps + 1 and got[0] == N, f"it begins with {N}, the state before the"
               " first pass: tell what stays after each pass.")
        refuse(len(got) != steps, f"for {steps} passes it has {len(got)} numbers; one for each"
               " pass, from k = 1 to k = steps.")
        refuse(got[-1] < 0, "the last number is below 0, as the cosine of a quarter turn in"
               " float32. Use math.cos.")
        progress = np.arange(1, steps + 1) / steps
        cosine, line = N * np.cos(np.pi / 2 * progress), N * (1 - progress)
        if steps == 3:                  # 100 cos 60° is 50 but for rounding: 49 will do as well
            got[1] += got[1] == 49
        straight = "that falls along a straight line. The cosine commits few at first."
        judge(got, right, (
            (np.floor(N * np.cos(np.pi / 2 * (progress - 1 / steps))), "it is one pass late: the"
             " first would commit nothing. Pass k has progress k / steps, with k from 1."),
            (np.ceil(line - 1e-9), straight),
            (np.floor(line + 1e-9), straight),
            (np.floor(N * np.sin(np.pi / 2 * progress)), "a sine grows; what stays masked falls."),
            (N - np.array(right), "that is how many are committed; asked is how many stay."),
            (-np.diff([N] + right), "that is how many each pass commits; asked is how many stay."),
            (np.round(cosine), "round down (math.floor), as DynamicsModel.to_commit does."),
            (np.ceil(cosine), "it rounds up, and the last cosine is not quite 0: round down."),
            (cosine, "these are no whole numbers of tokens: round down (math.floor).")),
            f"{case}it gives {shown(got[:4])} ...; right is {right[:4]} ... The angle is pi / 2 * k"
            " / steps.")


@exercise
def commit(student):
    """05: commit(confidence, masked, count) -> new masked, with the count surest unmasked."""
    draw = genie_mini.seeded(54)
    for count in (7, 3, 0):
        masked = torch.ones(4, 16, dtype=torch.bool)                    # 5 committed, 11 not
        confidence = torch.rand(4, 16, generator=draw).log()
        # The surest five are committed already: they must not be chosen again.
        masked.scatter_(-1, confidence.topk(5, dim=-1).indices, False)
        free = confidence.masked_fill(~masked, -torch.inf)

        def without(chosen, start=masked):
            return start.scatter(-1, chosen, False)

        best = free.topk(count, dim=-1).indices
        right = without(best)
        got = torch.as_tensor(answer(
            student, confidence, masked, count, case=f"for count = {count} ", kept="it changed its"
            " arguments. Return a new mask: scatter and masked_fill make a copy; with a trailing _"
            " they write in place."))
        refuse(got.shape != right.shape or got.dtype != torch.bool, "return a bool mask of shape"
               f" {tuple(right.shape)}, not {got.dtype} of {tuple(got.shape)}.")
        still = "True must mean 'still masked'; you return "
        judge(got, right, (
            (without(confidence.topk(count, dim=-1).indices), "it chose tokens that are committed"
             " already. Give them minus infinity first (not 0: every log-probability is below 0)."),
            (without((-confidence).masked_fill(~masked, -torch.inf).topk(count, dim=-1).indices),
             "it unmasked the least sure ones."),
            (masked & ~right, still + "what was committed just now."),
            (~right, still + "what is committed."),
            (without(free.topk(11 - count, dim=-1).indices), "`count` is how many to unmask, not"
             " how many to leave masked."),
            (without(best, torch.ones_like(masked)), "what was committed is masked again: start"
             " from `masked`.")),
            f"with count = {count} it unmasked {(masked & ~got).sum(-1).tolist()} tokens in the"
            f" four rows, and masked {(got & ~masked).sum().item()} again. In each row the surest"
            " of those still masked are wanted: topk along the last dimension.")


@exercise
def psnr_from_wrong(student):
    """06: psnr_from_wrong(count): powers, sign, share and the perfect frame."""
    counts = np.array([4096, 1024, 41, 1])
    right = np.array([genie_mini.psnr(count) for count in counts])
    got = [number(student, int(count)) for count in counts]
    judge(got, right, (
        (-right, "the sign is turned: the logarithm of a share below 1 is negative."),
        (2 * right, "the MSE is a square already: take 10 log10, not 20."),
        (right * np.log(10), "decibels use base 10 (math.log10)."),
        (right / 10, "these are bels: a decibel is a tenth of one, so 10 x."),
        (-10 * np.log10(counts), "the MSE is a share: divide by 64 x 64."),
        (-10 * np.log10(counts / 64), "a frame has 64 x 64 pixels, not 64.")),
        f"1,024 wrong pixels, a quarter of the frame, are {right[1]:.2f} dB; yours says"
        f" {got[1]:.2f}.")
    perfect = number(student, 0, case="right but for a frame without a wrong pixel: ")
    judge(perfect, genie_mini.psnr(0), (), "right but for a frame without a wrong pixel, where the"
          f" logarithm has no value: count at least 0.001 wrong pixels (you return {perfect:.2f}).")


@exercise
def delta_psnr(student):
    """06: delta_psnr of two lists of wrong pixels: the MSE is averaged before the logarithm."""
    pairs = [[torch.tensor(wrong) for wrong in pair] for pair in (
        ((2.0, 30.0, 118.0), (90.0, 40.0, 170.0)), ((0.0, 64.0), (16.0, 240.0)),
        ((50.0, 10.0), (20.0, 10.0)))]

    def delta(score):
        return np.array([score(inferred) - score(random) for inferred, random in pairs])

    right = delta(lambda wrong: genie_mini.psnr(wrong.mean().item()))
    late = delta(lambda wrong: np.mean([genie_mini.psnr(n) for n in wrong.tolist()]))
    got = [number(student, *pair) for pair in pairs]
    averaged = ("you averaged PSNRs, so the floor of the logarithm decides. Average the wrong"
                " pixels first, then take one PSNR of each mean.")
    judge(got, right, (
        (-right, "the sign is turned: inferred minus random."),
        ([late[0], got[1], late[2]], averaged),                 # whatever the floor in the second
        ([-late[0], got[1], -late[2]], averaged + " Besides, subtract the random actions' PSNR from"
         " the inferred ones'."),
        (-delta(lambda wrong: wrong.mean().item()), "you subtract wrong pixels: subtract PSNRs."),
        (2 * right, "twice the right value: 10 log10 of an MSE, not 20."),
        (right * np.log(10), "that is the natural logarithm; decibels use base 10.")),
        "for wrong pixels [50, 10] and [20, 10] the means are 30 and 15, and the delta is"
        f" {right[2]:.2f} dB; yours says {got[2]:.2f}.")


@exercise
def copy_baseline(student):
    """06: copy_baseline(frames): the error of a first frame kept for ever, at each later time."""
    frames = torch.zeros(2, 5, 64, 64, dtype=torch.uint8)
    for b in range(2):
        for t in range(5):                          # a bar that walks and grows; it comes back
            place = (0, 9, 20, 3, 0)[t] + 5 * b
            frames[b, t, 10:14 + t, place:place + 8] = 1
    first, later, signed = frames[:, :1], frames[:, 1:], frames.long()
    right = genie_mini.errors(later, first).mean(0)                     # (T-1,)
    got = answer(student, frames)
    try:
        got = torch.as_tensor(got).detach()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet("return a tensor (T-1,) of wrong pixels.") from None
    judge(got, right, (
        (genie_mini.errors(later, frames[:, :-1]).mean(0), "you compare with the frame before, the"
         " baseline one step ahead. A rollout has the first frame only: compare with [:, :1]."),
        (F.pad(right, (1, 0)), "leave out frame 0, which is given: T-1 values."),
        (right / 4096, "these are shares: sum over the pixels, do not average them."),
        (right * 2, "sum over the pixels, but average over the clips."),
        ((later - first).sum((-2, -1)).double().mean(0), "uint8 wraps: 0 - 1 is 255. Compare with"
         " != instead of subtracting."),
        ((signed[:, 1:] - signed[:, :1]).sum((-2, -1)).double().mean(0), "a pixel that goes out"
         " cancels one that lights up: compare with !=, or take abs()."),
        (genie_mini.errors(frames[:, :-1], frames[:, -1:]).mean(0), "you compare with the last"
         " frame; the model starts from the first, [:, :1]."),
        (genie_mini.errors(later, first), "average over the clips, dim 0.")),
        f"on a test clip the wrong pixels are {shown(right)}, shape (4,), one value for each later"
        f" frame; yours are {shown(got)}, shape {tuple(got.shape)}.")
