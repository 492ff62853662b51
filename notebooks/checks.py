"""Checks of the notebooks' exercises: each takes a student's function, tells right from wrong on
cases worked out by hand or by genie_mini itself, and says in one sentence what to look at.

A check prints its verdict and returns True or False. An exercise that was not begun (its stub
returns None) is no error: the notebooks run from top to bottom as they are.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_prep                                                        # noqa: E402
import genie_mini                                                       # noqa: E402
from extras import files                                            # noqa: E402


def verdict(right, advice):
    """Print what was found and return it. advice: what to look at, when it is not right."""
    print("Right." if right else f"Not yet: {advice}")
    return bool(right)


def opposite(student):
    """00: opposite(motion (A, 2), button) -> the button that moves most against it."""
    motion = torch.tensor([[0.1, 3.0], [2.4, -0.2], [0.0, -2.5], [0.0, 0.1], [-2.2, 0.1]])
    answers = {0: 2, 1: 4, 2: 0, 4: 1}
    try:
        given = {button: student(motion.clone(), button) for button in answers}
        if None in given.values():
            return verdict(False, "write the function first; the stub returns None.")
        given = {button: int(answer) for button, answer in given.items()}
    except Exception as error:
        return verdict(False, f"your function raised {type(error).__name__}: {error}. It gets"
                              " motion (A, 2) and a number, and returns a number.")
    if given == answers:
        return verdict(True, "")
    if all(given[button] == button for button in answers):
        return verdict(False, "you return the button itself: its own motion has the largest dot"
                              " product with it. The opposite has the most negative one: argmin.")
    small = {b: int((motion @ motion[b]).abs().argmin()) for b in answers}
    if given == small:
        return verdict(False, "you return the button that is most nearly at a right angle, or"
                              " stands still: its dot product is near 0. The opposite's is"
                              " negative, so take no absolute value.")
    for axis, name in enumerate(("dy", "dx")):
        if given == {b: int((motion[:, axis] * motion[b, axis]).argmin()) for b in answers}:
            return verdict(False, f"you look at {name} alone. A button can move things along either"
                                  " axis; the dot product of the two rows sums over both.")
    b = next(b for b in answers if given[b] != answers[b])
    rows = "; ".join(f"{dy:.1f} {dx:.1f}" for dy, dx in motion.tolist())
    return verdict(False, f"for the motions (dy dx) {rows} the opposite of button {b} is"
                          f" {answers[b]}, not {given[b]}. Compare the rows by their dot product"
                          " with motion[button].")


def turn(student):
    """00: turn(was, now, button, ways) -> the same button while the hero moves, else the next."""
    ways = [3, 0, 6, 1]
    moving = [((8, 8), (8, 12), b) for b in ways]
    blocked = [((8, 8), (8, 8), b) for b in ways]
    unknown = [(None, None, 6), ((8, 8), None, 6), (None, (8, 8), 6)]
    given = []
    for was, now, button in moving + blocked + unknown:
        try:
            given.append(student(was, now, button, list(ways)))
        except Exception as error:
            if (was, now, button) == blocked[-1]:
                return verdict(False, f"at the last of the four ways your function raised"
                                      f" {type(error).__name__}. After the last comes the first"
                                      " again: take the place modulo len(ways).")
            return verdict(False, f"for was {was}, now {now}, button {button}, ways {ways} your"
                                  f" function raised {type(error).__name__}: {error}.")
    if all(answer is None for answer in given):
        return verdict(False, "write the function first; the stub returns None.")
    went, stood, blind = given[:4], given[4:8], given[8:]
    if went != ways and stood == ways:
        return verdict(False, "it turns while the hero moves and goes on while it is blocked: the"
                              " test of was against now is the wrong way round.")
    if None in given:
        was, now, button = (moving + blocked + unknown)[given.index(None)]
        return verdict(False, f"for was {was}, now {now} it returns None: every path must return a"
                              " button, also the one on which nothing is to be done.")
    if went == [0, 1, 2, 3]:
        return verdict(False, "it returns the place in the list. Return the button that stands"
                              " there, ways[place].")
    if went != ways:
        return verdict(False, "the hero moved and still the button changed. Going on means to"
                              " return the button that was pressed last.")
    if stood == ways:
        return verdict(False, "the hero stands still, was == now, and the button stays the same: it"
                              " would press against the wall for ever.")
    if stood == [ways[(i - 1) % 4] for i in range(4)]:
        return verdict(False, "it turns left. The list is clockwise, so right is the next one:"
                              " + 1.")
    if any(answer not in ways for answer in stood) or stood == [ways[(b + 1) % 4] for b in ways]:
        return verdict(False, "it counts on from the button's number. Those numbers are in no"
                              f" order, as in {ways}: count on from its place, ways.index(button).")
    if stood != [ways[(i + 1) % 4] for i in range(4)]:
        return verdict(False, f"blocked with each of {ways} in turn, it presses {stood}; to turn"
                              f" right is {[ways[(i + 1) % 4] for i in range(4)]}.")
    if blind != [6, 6, 6]:
        return verdict(False, "no hero was found in a frame (None), and it turned. None == None is"
                              " no standing hero: ask for None first, and keep the button.")
    return verdict(True, "")


def motion_kept(student):
    """Exercise 1 of notebook 01: the share of the grey change that has a binary one beside it."""
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
    step = np.diff(grey.astype(int), axis=0)
    change, wrapped, flips = abs(step), np.diff(grey, axis=0), binary[1:] != binary[:-1]
    weight, near, moves = change * (change > 8), data_prep.spread(flips), change > 8
    around = [np.roll(flips, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    kept = (weight * near).sum()
    right = kept / weight.sum()
    no_weights = ("you count pixels. One that changes by 100 levels must weigh ten times as much "
                  "as one that changes by 10: sum the changes themselves.")
    no_neighbours = ("you ask for a binary change in the very same pixel. One pixel beside it is "
                     "near enough: spread the binary changes first.")
    by_binary = ("you divide by the binary changes. Of the grey change a share is kept, so the "
                 "sum of all grey change stands below the line.")
    wraps = ("uint8 knows no negative numbers: what gets darker by 3 has changed by 253. Turn grey "
             "into int before you subtract.")
    below = "changes of up to 8 levels are noise, and count neither above nor below the line."
    wrongs = (
        ((moves & near).sum() / moves.sum(), no_weights),
        ((weight * flips).sum() / weight.sum(), no_neighbours),
        ((moves & flips).sum() / moves.sum(), no_weights + " Besides, " + no_neighbours),
        (kept / flips.sum(), by_binary),
        ((moves & near).sum() / flips.sum(), by_binary + " Besides, " + no_weights),
        ((weight * flips).sum() / flips.sum(), by_binary + " Besides, " + no_neighbours),
        (kept / near.sum(), by_binary),
        *(((flips & data_prep.spread(change > k)).sum() / flips.sum(),
           "of the binary changes you return the share with a grey one beside them. That is "
           "'true', the other number.") for k in (4, 8)),
        ((data_prep.spread(weight) * flips).sum() / weight.sum(), "you spread the grey change. It "
         "is the binary change that may be one pixel away: spread that one."),
        *(((w * near).sum() / w.sum(), wraps)
          for w in (wrapped * (wrapped > 8), wrapped.astype(int))),
        ((change * near).sum() / change.sum(), below),
        (kept / change.sum(), below),
        *(((w * near).sum() / w.sum(), "what gets darker has changed as well: take abs() of the "
           "difference.") for w in (step * (step > 8), -step * (step < -8))),
        *(((w * near).sum() / w.sum(), "weigh each pixel by its whole change, not by what exceeds "
           "8 levels: a change of 9 counts 9, one of 8 counts 0.")
          for w in ((change - 8).clip(0), change * (change >= 8))),
        *(((weight * data_prep.spread(b)).sum() / weight.sum(), "you look for white pixels. A "
           "thing that stands still is white as well: compare each picture with the one before.")
          for b in (binary[1:], binary[:-1])),
        ((weight * (around[1] | around[3] | around[4] | around[5] | around[7])).sum()
         / weight.sum(), "within one pixel are all eight neighbours, those at the corners too."),
        ((weight * np.any(around, axis=0)).sum() / weight.sum(), "np.roll lets what leaves on the "
         "right come in on the left: the two edges are no neighbours. Pad, or use spread()."),
        (np.mean((weight * near).sum((1, 2)) / weight.sum((1, 2))), "you average over the steps. "
         "Sum over all of them first, and divide once: a step in which much moves counts more."),
        ((weight * data_prep.spread(np.diff(binary, axis=0))).sum() / weight.sum(), "binary is "
         "uint8, too, and 0 - 1 is 255: ask where two successive pictures differ, with !=."),
        (1 - right, "that is the share that is lost."),
        (100 * right, "return a share from 0 to 1, not a percentage."),
        (kept, "that is the sum that is kept: divide it by the sum of all grey change."))
    try:
        got = student(grey.copy(), binary.copy())
        if got is None:
            return verdict(False, "write the function first.")
        got = float(got)
    except Exception as error:
        return verdict(False, f"your function raised {type(error).__name__}: {error}. It gets two "
                       f"arrays {grey.shape} of uint8 and returns one number.")
    if np.isclose(got, right, rtol=1e-5):
        return verdict(True, "")
    for value, advice in wrongs:
        if np.isclose(got, value, rtol=1e-5):
            return verdict(False, advice)
    return verdict(False, f"on the film of this check {right:.3f} is kept, and you return "
                   f"{got:.3f}. Above the line: the weights (grey changes over 8) of the pixels "
                   "with a binary change within one pixel. Below it: all weights.")


def staggered(student):
    """Exercise 2 of notebook 01: deal frames (T, ...) out to `stride` sequences."""
    for shape, stride in (((48,), 3), ((12, 2, 5), 2), ((20, 3), 5)):
        frames = np.arange(np.prod(shape)).reshape(shape)
        try:
            got = student(frames.copy(), stride)
        except Exception as error:
            return verdict(False, f"on frames of shape {shape} with stride={stride} it raised "
                           f"{type(error).__name__}: {error}")
        if got is None:
            return verdict(False, "write the function first.")
        right = frames.reshape(-1, stride, *shape[1:]).swapaxes(0, 1)
        try:
            got = np.asarray(got)
        except ValueError:
            return verdict(False, "the sequences are not equally long, so they form no array. Each "
                           f"has T // stride frames: offsets 0 to {stride - 1}, to the end.")
        if got.shape == right.swapaxes(0, 1).shape != right.shape:
            return verdict(False, f"{got.shape} has the axes the wrong way round: the sequences "
                           "come first, then the frames of each. Swap the first two axes.")
        if got.shape != right.shape:
            return verdict(False, f"frames {shape} with stride={stride} must give {right.shape}, "
                           f"not {got.shape}: stride sequences of T // stride frames, and what "
                           "follows the first axis stays as it is.")
        if np.array_equal(got, right):
            continue
        if np.array_equal(got, frames.reshape(right.shape)):
            return verdict(False, "each sequence holds neighbouring frames, so it still runs at "
                           "the source's rate and lasts a third as long. The next frame of a "
                           "sequence is `stride` later: see the rows of section 6.")
        if np.array_equal(got, right[::-1]):
            return verdict(False, "the sequences are right but in reverse order: the first is the "
                           "one with offset 0. Labels and `start` count on that order.")
        return verdict(False, f"the shape is right, the frames are not. With stride={stride}, "
                       f"sequence 1 should begin with frames 1, {1 + stride}, {1 + 2 * stride}.")
    return verdict(True, "")


def split_by_time(student):
    """Exercise 3 of notebook 01: the test split is the last whole windows, in time."""
    rng = np.random.default_rng(0)
    for numbers, share in ((np.arange(20), 0.2), (np.append(np.arange(20), [27, 28, 29]), 0.2),
                           (np.arange(12), 0.01), (np.arange(7), 0.45)):
        start = (numbers[:, None] * files.WINDOW + np.arange(files.STRIDE)).ravel()
        start = rng.permutation(start)
        window, count = start // files.WINDOW, max(1, round(share * len(numbers)))
        right = window >= numbers[-count]
        case = f"with {len(numbers)} windows and share={share}"
        try:
            got = student(start.copy(), share)
        except Exception as error:
            return verdict(False, f"{case} it raised {type(error).__name__}: {error}")
        if got is None:
            return verdict(False, "write the function first.")
        got = np.asarray(got)
        if got.shape != start.shape or got.dtype != bool:
            return verdict(False, f"return one bool for each sequence, shape {start.shape}; this "
                           f"is {got.dtype} of shape {got.shape}.")
        if (got == right).all():
            continue
        if not got.any():
            return verdict(False, f"{case} nothing is in test: at least one window must be.")
        torn = len(set(window[got]) & set(window[~got]))
        if torn > 0:
            return verdict(False, f"{case}, {torn} window(s) have sequences on both sides: that is "
                           "the leak of section 8. Decide by start // 48, window by window, never "
                           "sequence by sequence or by the place in the array.")
        if got.all():
            return verdict(False, f"{case} all is in test and nothing is left to train on. "
                           "A slice [-0:] takes everything: round may give 0.")
        if window[got].min() < window[~got].max():
            return verdict(False, f"{case}, the test split is not the last block of time: training "
                           "windows come after it. Mind that `start` is in any order.")
        return verdict(False, f"{case}, whole windows at the end are in test, as it should be, but "
                       f"{len(set(window[got]))} of them where {count} are wanted. Some windows "
                       "may be missing from the file: count those that are there, not ticks.")
    return verdict(True, "")


def cut_patches(student):
    """Exercise 1 of notebook 02: frames (B, T, H, W) into patches (B, T, N, P)."""
    for shape, patch in (((1, 1, 4, 4), 2), ((2, 3, 8, 12), 4)):
        B, T, H, W = shape
        frames = torch.arange(B * T * H * W).view(shape)
        try:
            got = student(frames.clone(), patch)
        except Exception as error:
            return verdict(False, f"on frames of shape {shape} with patch={patch} it raised "
                           f"{type(error).__name__}: {error}")
        if got is None:
            return verdict(False, "write the function first.")
        right = genie_mini.patchify(frames, patch)
        if not torch.is_tensor(got) or got.shape != right.shape:
            shown = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
            return verdict(False, f"frames {shape} with patch={patch} must give "
                           f"{tuple(right.shape)}, not {shown}: N counts the patches of a frame "
                           "and P the pixels of a patch, each flattened into one axis.")
        got = got.to(right.dtype)
        if torch.equal(got, right):
            continue
        if torch.equal(got, frames.reshape(right.shape)):
            return verdict(False, "the shape is right, but each patch is a strip of one row of "
                           "pixels: reshape keeps the order of the memory. Split both sides into "
                           "(which patch, where in it), and permute before you flatten.")
        rows, columns = H // patch, W // patch
        tall = right.view(B, T, rows, columns, -1).transpose(2, 3).reshape(right.shape)
        if torch.equal(got, tall):
            return verdict(False, "the patches come column by column. Row by row is what the "
                           "rotary angles of STBlock count on: patch 1 is to the right "
                           "of patch 0, not under it.")
        turned = right.view(B, T, -1, patch, patch).transpose(3, 4).reshape(right.shape)
        if torch.equal(got, turned):
            return verdict(False, "the patches are in order, but in each the pixels come column by "
                           "column, so unpatchify would draw it mirrored along its diagonal. "
                           "Look at the last two axes of the permute.")
        return verdict(False, f"the shape is right, the pixels are not. For frames {shape} the "
                       f"first patch should hold {right[0, 0, 0].tolist()}, and it holds "
                       f"{got[0, 0, 0].tolist()}.")
    return verdict(True, "")


def causal_weights(student):
    """Exercise 2 of notebook 02: scores (T, T) into causal attention weights (T, T)."""
    scores = torch.tensor([[0.3, 2.0, -1.0, 0.5], [1.0, -0.5, 3.0, 0.0],
                           [-1.0, 0.7, 0.2, 2.5], [0.4, -2.0, 1.1, 0.9]])
    later = torch.ones(4, 4).triu(1).bool()
    right = scores.masked_fill(later, -torch.inf).softmax(-1)
    try:
        got = student(scores.clone())
    except Exception as error:
        return verdict(False, f"it raised {type(error).__name__}: {error}")
    if got is None:
        return verdict(False, "write the function first.")
    if not torch.is_tensor(got) or got.shape != right.shape:
        return verdict(False, "scores (T, T) must give a tensor of weights (T, T).")

    def same(other):
        return torch.allclose(got.double(), other.double(), atol=1e-5)

    if torch.isnan(got).any():
        return verdict(False, "there is a NaN: some row has no score left but minus infinity. A "
                       "frame sees itself, so mask only what is later (triu(1), not triu(0)).")
    if same(scores.softmax(-1)):
        return verdict(False, "nothing is masked: frame 0 looks at frames 1 to 3, which do not "
                       "exist yet when it is made.")
    if same(scores.masked_fill(later, 0).softmax(-1)):
        return verdict(False, "a masked score of 0 is no zero weight: exp(0) = 1, so the future "
                       "still has its share. The score must be minus infinity.")
    if same(scores.softmax(-1).masked_fill(later, 0)):
        return verdict(False, "the future is set to zero after the softmax, so the rows no longer "
                       "sum to 1, and what is left still depends on the later scores, which were "
                       "in the sum. Mask before the softmax.")
    if same(scores.masked_fill(later.T, -torch.inf).softmax(-1)):
        return verdict(False, "the mask is on the wrong side: this sees the future and not the "
                       "past. Row t is the frame that looks, column s what it looks at; s > t is "
                       "the future.")
    if same(scores.masked_fill(later, -torch.inf).softmax(0)):
        return verdict(False, "the softmax runs down the columns. Each frame that looks is a row, "
                       "and its weights sum to 1: dim=-1.")
    if not same(right):
        if got.triu(1).abs().max() > 1e-6:
            return verdict(False, "there is weight above the diagonal: some frame sees a later "
                           "one.")
        if not torch.allclose(got.sum(-1), torch.ones(4, dtype=got.dtype), atol=1e-4):
            return verdict(False, "the rows do not sum to 1: the softmax must be taken over what "
                           "each frame may see.")
        return verdict(False, f"row 1 should be {[round(w, 3) for w in right[1].tolist()]}, and "
                       f"is {[round(w, 3) for w in got[1].tolist()]}. Is it softmax(scores), "
                       "without any further scaling?")
    try:
        large = student(scores * 1000)
    except Exception as error:
        return verdict(False, f"on large scores it raised {type(error).__name__}: {error}")
    wanted = (scores * 1000).masked_fill(later, -torch.inf).softmax(-1)
    return verdict(torch.is_tensor(large) and torch.allclose(large.double(), wanted.double(),
                                                             atol=1e-5),
                   "right for small scores, but not for scores in the thousands: there exp() "
                   "overflows, and a row cut off after the softmax may have nothing left. Put "
                   "minus infinity into the scores and let torch.softmax do the rest.")


def _codebook_answer(student, *args):
    """The student's answer, and what to say if there is none (an exception, or nothing written)."""
    try:
        answer = student(*args)
    except Exception as error:
        return None, f"your function raised {type(error).__name__}: {error}"
    return answer, "write the function first." if answer is None else ""


def _codebook_shape(answer, shape):
    """What to say of an answer that is no tensor of this shape; nothing if it is one."""
    if not isinstance(answer, torch.Tensor):
        return f"return a tensor; yours is a {type(answer).__name__}."
    if answer.shape != torch.Size(shape):
        return f"the shape should be {tuple(shape)}; yours is {tuple(answer.shape)}."
    return ""


def nearest_code(student):
    """nearest_code(z, codebook): the squared distance decides, for z of any leading shape."""
    codebook = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    z = torch.tensor([[1.5, 0.2], [0.1, 0.9], [-3.0, -1.0], [3.5, 0.0]])
    answer, trouble = _codebook_answer(student, z, codebook)
    trouble = trouble or _codebook_shape(answer, (4,))
    if trouble:
        return verdict(False, trouble)
    distance = ((z[:, None] - codebook) ** 2).sum(-1)
    if torch.equal(answer.long(), distance.argmax(1)):
        return verdict(False, "these are the farthest codes: take the smallest distance, not the"
                       " largest.")
    if torch.equal(answer.long(), (z @ codebook.T).argmax(1)):
        return verdict(False, "the largest dot product is not the smallest distance: a long code"
                       " wins too often. ||z - c||^2 also has the term ||c||^2.")
    if not torch.equal(answer.long(), distance.argmin(1)) or answer.is_floating_point():
        return verdict(False, f"for the four test points it should be {distance.argmin(1).tolist()}"
                       f" (whole numbers), not {answer.tolist()}: sum the squared differences over"
                       " the L numbers of each pair, then take the index of the smallest.")
    z = torch.randn(2, 3, 5, 16, generator=genie_mini.seeded(0))
    codebook = torch.randn(7, 16, generator=genie_mini.seeded(1))
    answer, trouble = _codebook_answer(student, z, codebook)
    trouble = trouble or _codebook_shape(answer, (2, 3, 5))
    if trouble:
        return verdict(False, "right for z (M, L), but the encoder hands over (B, T, N, L): "
                       + trouble)
    right = torch.cdist(z.reshape(-1, 16), codebook).argmin(1).view(2, 3, 5)
    return verdict(torch.equal(answer.long(), right), "right for z (M, L), wrong for z"
                   " (B, T, N, L): only the last axis is summed over.")


def ema_step(student):
    """ema_step(count, total, z, indices, decay): a decayed count and sum for each code."""
    count, total = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([[2.0, 4.0], [3.0, 0.0], [1.0, 1.0]])
    z = torch.tensor([[1.0, 1.0], [3.0, 5.0], [2.0, -2.0], [5.0, 0.0]])
    indices = torch.tensor([0, 0, 1, 0])
    answer, trouble = _codebook_answer(student, count.clone(), total.clone(), z, indices, 0.9)
    if not trouble and not (isinstance(answer, (tuple, list)) and len(answer) == 2):
        trouble = "return two tensors, the new count and the new total."
    trouble = (trouble or _codebook_shape(answer[0], (3,)) or _codebook_shape(answer[1], (3, 2)))
    if trouble:
        return verdict(False, trouble)

    def step(chosen, decay, new=1.0):
        return (decay * count + new * chosen.sum(0), decay * total + new * chosen.T @ z)

    def same(pair):
        return all(torch.allclose(a.float(), b) for a, b in zip(answer, pair))

    chosen = F.one_hot(indices, 3).float()
    once = chosen * torch.tensor([0, 0, 1, 1.0])[:, None]           # z[3] overwrites the others
    if same(step(chosen, 0.1, 0.9)):
        return verdict(False, "decay and 1 - decay are swapped: with 0.9, nine tenths of the *old*"
                       " value stay, or the codes would jump about with every batch.")
    if same(step(chosen, 0.9)):
        return verdict(False, "what is new must be weighted with 1 - decay; otherwise counts and"
                       " sums grow to ten times what a step brings.")
    if same((0.9 * count + 0.1 * chosen.sum(0),
             0.9 * total + 0.1 * chosen.T @ z / chosen.sum(0).clamp_min(1)[:, None])):
        return verdict(False, "the total takes the *sum* of the vectors, not their mean: the count"
                       " divides it later, so you would divide twice.")
    if same(step(once, 0.9, 0.1)):
        return verdict(False, "x[indices] += z adds only one of several vectors with the same"
                       " index. Use one_hot(indices).T @ z, or index_add_.")
    kept = [torch.where(chosen.sum(0)[(...,) + (None,) * (new.ndim - 1)] > 0, new, old)
            for new, old in zip(step(chosen, 0.9, 0.1), (count, total))]
    if same(kept):
        return verdict(False, "a code that nobody chose fades too, count and sum alike, so that it"
                       " stays where it is but weighs less when somebody comes.")
    wanted = step(chosen, 0.9, 0.1)
    return verdict(same(wanted), f"for the test case the count should be {wanted[0].tolist()} and"
                   f" the total {wanted[1].tolist()}; yours are {answer[0].tolist()} and"
                   f" {answer[1].tolist()}.")


def d2_weights(student):
    """d2_weights(z, codebook): squared distance to the nearest code, made to sum to 1."""
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 3.0], [5.0, 0.0], [8.0, 0.0]])
    answer, trouble = _codebook_answer(student, z, codebook)
    trouble = trouble or _codebook_shape(answer, (5,))
    if trouble:
        return verdict(False, trouble)
    distance = ((z[:, None] - codebook) ** 2).sum(-1)
    wanted = distance.min(1).values

    def like(weights):
        return torch.allclose(answer.float(), weights / weights.sum(), atol=1e-5)

    if torch.allclose(answer.float(), wanted):
        return verdict(False, "these are the squared distances; as probabilities they must sum to"
                       " 1: divide by their sum.")
    if like(wanted.sqrt()):
        return verdict(False, "the distances are not squared. The square makes far clusters win"
                       " against the many points that are near a code.")
    if like(distance.mean(1)) or like(distance.max(1).values):
        return verdict(False, "only the *nearest* code counts: take the minimum over the codes. A"
                       " vector that lies on a code must have probability 0.")
    if like(distance.min(1).indices.float()):
        return verdict(False, "these are indices of codes: min(dim) returns values and indices.")
    return verdict(like(wanted), f"for the test case it should be"
                   f" {[round(p, 3) for p in (wanted / wanted.sum()).tolist()]}; yours is"
                   f" {[round(p, 3) for p in answer.tolist()]}.")


def _answer_04(student, *inputs):
    """What the function returns on copies of the inputs, and None or a complaint."""
    try:
        answer = student(*(x.copy() if isinstance(x, np.ndarray) else x.clone() for x in inputs))
    except Exception as error:
        return None, f"your function raised {type(error).__name__}: {error}"
    return answer, "write the function first: it returns None." if answer is None else None


def _number_04(student, *inputs):
    """Like _answer_04, for functions that return one number: a float, or a complaint."""
    answer, trouble = _answer_04(student, *inputs)
    if trouble:
        return None, trouble
    try:
        return float(answer), None
    except (TypeError, ValueError, RuntimeError):
        return None, f"return one number; this is a {type(answer).__name__}."


def _tensor_04(student, shape, *inputs):
    """Like _answer_04, for functions that return a tensor of this shape."""
    answer, trouble = _answer_04(student, *inputs)
    if trouble:
        return None, trouble
    if not isinstance(answer, torch.Tensor):
        return None, f"return a tensor; this is a {type(answer).__name__}."
    if answer.shape != shape:
        return None, f"the shape should be {tuple(shape)} and is {tuple(answer.shape)}."
    return answer, None


def majority_accuracy(student):
    """Exercise 1 of notebook 4: the share of steps right after mapping codes to actions."""
    latent = np.array([2, 2, 2, 0, 0, 3, 3, 3, 3, 0])
    true = np.array([0, 0, 1, 1, 1, 0, 0, 0, 2, 1])                     # by hand: 8 of 10
    got, trouble = _number_04(student, latent, true)
    if trouble:
        return verdict(False, trouble)
    if abs(got - 8) < 1e-6:
        return verdict(False, "that is how many steps are right; divide by how many there are.")
    if abs(got - np.mean(latent == true)) < 1e-6:
        return verdict(False, "you compare the numbers themselves. The LAM numbers its codes as it"
                       " likes, so code 2 may mean action 0: map each code to an action first.")
    if abs(got - 0.7) < 1e-6:
        return verdict(False, "you take the commonest code of each action. Two codes may share an"
                       " action at no loss, so go by codes: the commonest action of each.")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        case = rng.integers(8, size=200), rng.integers(5, size=200)
        want = genie_mini.compare_actions(*case)["accuracy"]
        other, trouble = _number_04(student, *case)
        if trouble or abs(other - want) > 1e-6:
            return verdict(False, trouble or f"on random codes it should be {want:.3f} and is"
                           f" {other:.3f}: sum the largest count of each code, over all steps.")
    return verdict(abs(got - 0.8) < 1e-6, f"on a case counted by hand it should be 0.8, not"
                   f" {got:.3f}: code 2 is right twice, 0 and 3 three times, of ten steps.")


def pool_changed(student):
    """Exercise 2 of notebook 4: the mean of the patches that moved."""
    x = torch.randn(2, 3, 6, 4, generator=genie_mini.seeded(5))
    moved = torch.rand(2, 3, 6, generator=genie_mini.seeded(6)) < 0.4
    moved[0, 0], moved[1, 2] = False, True
    moved[0, 1] = torch.tensor([True] + 5 * [False])
    total = (x * moved[..., None]).sum(2)
    want = total / moved.sum(2, keepdim=True).clamp_min(1)
    got, trouble = _tensor_04(student, want.shape, x, moved)
    if trouble:
        return verdict(False, trouble)
    if not torch.isfinite(got).all():
        return verdict(False, "a step in which nothing moved gives 0 / 0, and one NaN spoils every"
                       " weight at the next step: let the count be at least 1.")
    for wrong_answer, advice in (
            (x.mean(2), "that is the mean over all patches: the few that moved drown in it."),
            (total / x.shape[2], "you divide by all patches, so the vector shrinks where few moved;"
             " divide by how many moved."),
            (total, "that is the sum: a large thing would shout louder than a small one. Divide by"
             " how many patches moved.")):
        if torch.allclose(got, wrong_answer, atol=1e-5):
            return verdict(False, advice)
    return verdict(torch.allclose(got, want, atol=1e-5), "some vectors are wrong: for each step,"
                   " average x over the patches whose moved is True, and over no others.")


def masked_loss(student):
    """student(logits, tokens, masked) -> mean cross-entropy of the masked tokens, in nats."""
    draw = genie_mini.seeded(51)
    logits = torch.randn(2, 3, 6, 4, generator=draw)                    # (B, T, N, K)
    tokens = torch.randint(4, (2, 3, 6), generator=draw)
    masked = torch.rand(2, 3, 6, generator=draw) < 0.6
    masked[:, 0] = False
    each = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    kept = tokens.clone()
    try:
        answer = student(logits.clone(), tokens, masked.clone())
        if answer is None:
            return verdict(False, "write the function first.")
        value = float(answer)
    except IndexError as error:
        return verdict(False, f"it raised IndexError: {error} Is the 'masked' symbol among your"
                              " targets? It is no class: the targets are the true tokens.")
    except Exception as error:
        return verdict(False, f"it raised {type(error).__name__}: {error}")
    if not torch.equal(tokens, kept):
        return verdict(False, "it changed `tokens`. They are the answers: the targets are taken"
                              " before the masking; only the model's input is masked.")
    if abs(value - each[masked].mean().item()) < 1e-4:
        return verdict(True, "")
    typical = [
        (each.mean(), "that is the mean over all tokens. A visible one is no question, since its"
                      " answer stands in the input; select with [masked] before the mean."),
        (each[~masked].mean(), "that is the loss of the visible tokens: True in `masked` means"
                               " hidden, and the hidden ones are what is asked."),
        (each[masked].sum(), "that is the sum over the masked tokens. It would grow with the"
                             " masking rate; divide by how many there are."),
        ((each * masked).mean(), "the visible tokens are set to zero but still counted in the"
                                 " divisor; divide by the number of masked ones."),
        (-each[masked].mean(), "the sign is wrong: a loss is minus the log-probability."),
        (each[masked].mean() / np.log(2), "that is in bits: use the natural logarithm."),
    ]
    for wrong_value, advice in typical:
        if abs(value - float(wrong_value)) < 1e-4:
            return verdict(False, advice)
    return verdict(False, f"{value:.4f} instead of {each[masked].mean():.4f}. Start from"
                          " F.cross_entropy(logits[masked], tokens[masked]); see"
                          " DynamicsModel.loss.")


def mask_schedule(student):
    """student(N, steps) -> how many of N tokens stay masked after each of the passes."""
    by_hand = {(256, 10): [252, 243, 228, 207, 181, 150, 116, 79, 40, 0], (256, 1): [0],
               (100, 3): [86, 50, 0], (16, 4): [14, 11, 6, 0]}
    for (N, steps), right in by_hand.items():
        progress = np.arange(1, steps + 1) / steps
        cosine = N * np.cos(np.pi / 2 * progress)
        try:
            answer = student(N, steps)
            if answer is None:
                return verdict(False, "write the function first.")
            answer = [float(x) for x in answer]
        except Exception as error:
            return verdict(False, f"for N = {N}, steps = {steps} it raised"
                                  f" {type(error).__name__}: {error}")
        # 100 * cos(60 degrees) is 50 up to rounding: either neighbour will do.
        if len(answer) == steps and all(a == r or a == max(0, np.floor(c - 1e-9))
                                        for a, r, c in zip(answer, right, cosine)):
            continue
        if len(answer) == steps + 1 and answer[0] == N:
            return verdict(False, f"it begins with {N}, the state before the first pass. The list"
                                  " has one number for each pass: how many stay masked after it.")
        if len(answer) != steps:
            return verdict(False, f"for {steps} passes it has {len(answer)} numbers; one for each"
                                  " pass, from k = 1 to k = steps.")
        early = N * np.cos(np.pi / 2 * (progress - 1 / steps))
        if answer[-1] < 0:
            return verdict(False, "the last number is below 0: in float32 the cosine of a quarter"
                                  " turn comes out a little negative. Use math.cos.")
        typical = [
            (np.floor(early), "it is one pass late: the first number is N, so the first pass would"
                              " commit nothing and after the last some are left. Pass k has"
                              " progress k / steps, with k from 1."),
            (np.ceil(N * (1 - progress) - 1e-9), "that falls along a straight line, rounded up."
                                                 " The cosine commits few at first."),
            (np.floor(N * (1 - progress) + 1e-9), "that falls along a straight line. The cosine"
                                                  " commits few at first, when least is known."),
            (np.floor(N * np.sin(np.pi / 2 * progress)), "a sine grows: that is how many are"
                                                         " committed. Asked is how many stay."),
            (N - np.array(right), "that is how many are committed so far; asked is how many stay"
                                  " masked."),
            (-np.diff([N] + right), "that is how many each pass commits; asked is how many stay"
                                    " masked after it."),
            (np.round(cosine), "it rounds to the nearest; DynamicsModel.sample rounds down"
                               " (math.floor), so that a pass never commits less than its share."),
            (np.ceil(cosine), "it rounds up: the last cosine is not exactly 0 in floating point,"
                              " so a token would stay masked for ever. Round down."),
        ]
        for wrong_list, advice in typical:
            if np.allclose(answer, wrong_list, atol=1e-3):
                return verdict(False, advice)
        if np.allclose(answer, cosine, atol=1e-3):
            return verdict(False, "these are no whole numbers of tokens: round down (math.floor).")
        return verdict(False, f"for N = {N}, steps = {steps} it gives {answer[:4]} ...;"
                              f" right is {right[:4]} ... The angle is pi / 2 * k / steps.")
    return verdict(True, "")


def commit(student):
    """student(confidence, masked, count) -> new masked, with the count surest unmasked."""
    draw = genie_mini.seeded(54)
    for count in (7, 3, 0):
        masked = torch.ones(4, 16, dtype=torch.bool)                    # 5 committed, 11 not
        confidence = torch.rand(4, 16, generator=draw).log()
        # The surest five are committed already: they must not be chosen again.
        masked.scatter_(-1, confidence.topk(5, dim=-1).indices, False)
        free = confidence.masked_fill(~masked, -torch.inf)
        right = masked.scatter(-1, free.topk(count, dim=-1).indices, False)
        given, sure = masked.clone(), confidence.clone()
        try:
            answer = student(sure, given, count)
            if answer is None:
                return verdict(False, "write the function first.")
            answer = torch.as_tensor(answer)
        except Exception as error:
            return verdict(False, f"for count = {count} it raised {type(error).__name__}: {error}")
        if not (torch.equal(given, masked) and torch.equal(sure, confidence)):
            return verdict(False, "it changed its arguments. Return a new mask: scatter and"
                                  " masked_fill make a copy; with a trailing _ they write in"
                                  " place.")
        if answer.shape != right.shape or answer.dtype != torch.bool:
            return verdict(False, f"return a bool mask of shape {tuple(right.shape)}, not"
                                  f" {answer.dtype} of {tuple(answer.shape)}.")
        if torch.equal(answer, right):
            continue
        again = masked.scatter(-1, confidence.topk(count, dim=-1).indices, False)
        least = confidence.masked_fill(~masked, torch.inf)
        least = least.topk(count, dim=-1, largest=False).indices
        stay = torch.zeros_like(masked)
        stay.scatter_(-1, free.topk(count, dim=-1).indices, True)
        left = masked.scatter(-1, free.topk(11 - count, dim=-1).indices, False)
        typical = [
            (again, "it chose tokens that are committed already, which are often the surest of"
                    " all, and so unmasked too few new ones. Give them minus infinity first"
                    " (not 0: every log-probability is below 0)."),
            (masked.scatter(-1, least, False), "it unmasked the least sure ones: topk with the"
                                               " largest values is wanted."),
            (stay, "True must mean 'still masked'; you return what was committed just now."),
            (~right, "True must mean 'still masked'; you return the opposite."),
            (stay | ~masked, "True must mean 'still masked'; you return what is committed."),
            (left, "`count` is how many to unmask, not how many to leave masked."),
            (torch.ones_like(masked).scatter(-1, free.topk(count, dim=-1).indices, False),
             "what was committed before is masked again: start from `masked`. A committed token"
             " is never taken back."),
        ]
        for wrong_mask, advice in typical:
            if torch.equal(answer, wrong_mask):
                return verdict(False, advice)
        if not torch.equal(answer | masked, masked):
            return verdict(False, "it masked tokens that were committed already; a committed token"
                                  " is never taken back.")
        found = (masked & ~answer).sum(dim=-1).tolist()
        if found != [count] * 4:
            return verdict(False, f"count = {count}, but it unmasked {found} tokens in the four"
                                  " rows. Each row gets its own topk, along the last dimension.")
        return verdict(False, "the right number, but not the surest of those still masked in each"
                              " row.")
    return verdict(True, "")


def _numbers_06(student, cases):
    """What student(*case) returns for each case, as floats, or a sentence about what went wrong."""
    found = []
    for case in cases:
        try:
            value = student(*case)
        except Exception as error:
            return f"your function raised {type(error).__name__}: {error}"
        if value is None:
            return "write the function first"
        try:
            found.append(float(value))
        except (TypeError, ValueError, RuntimeError):
            return "return one number, in dB"
    return found


def psnr_from_wrong(student):
    """Decibels of a frame with some wrong pixels: powers, sign, share and the perfect frame."""
    counts = (4096, 1024, 41, 1)
    found = _numbers_06(student, [(count,) for count in counts])
    if isinstance(found, str):
        return verdict(False, found)
    right = [genie_mini.psnr(count) for count in counts]
    wrongs = (
        ([-value for value in right],
         "the sign is turned: fewer wrong pixels must give more dB, and the logarithm of a share"
         " below 1 is negative"),
        ([2 * value for value in right],
         "twice the right value: 20 log10 is for amplitudes, and the MSE is a square already, so"
         " take 10 log10"),
        ([value * np.log(10) for value in right],
         "that is the natural logarithm (math.log); decibels use base 10 (math.log10)"),
        ([value / 10 for value in right], "these are bels: a decibel is a tenth of one, so 10 x"),
        ([-10 * np.log10(count) for count in counts],
         "divide by the 64 x 64 pixels of a frame: the MSE is the share of wrong pixels, not"
         " their number, and a frame that is all wrong has 0 dB"),
        ([-10 * np.log10(count / 64) for count in counts],
         "a frame has 64 x 64 pixels, not 64"))
    for values, advice in wrongs:
        if np.allclose(found, values, atol=0.01) and not np.allclose(values, right, atol=0.01):
            return verdict(False, advice)
    if not np.allclose(found, right, atol=0.01):
        return verdict(False, f"1,024 wrong pixels, a quarter of the frame, are {right[1]:.2f} dB;"
                       f" yours says {found[1]:.2f}")
    perfect = _numbers_06(student, [(0,)])
    if isinstance(perfect, str) or not np.isclose(perfect[0], genie_mini.psnr(0), atol=0.01):
        said = perfect if isinstance(perfect, str) else f"you return {perfect[0]:.2f}"
        return verdict(False, "right but for a frame without a wrong pixel, where the logarithm has"
                       f" no value: count at least 0.001 wrong pixels ({said})")
    return verdict(True, "")


def delta_psnr(student):
    """Delta PSNR of two lists of wrong pixels: the MSE is averaged before the logarithm."""
    pairs = (((2.0, 30.0, 118.0), (90.0, 40.0, 170.0)), ((0.0, 64.0), (16.0, 240.0)),
             ((50.0, 10.0), (20.0, 10.0)))
    found = _numbers_06(student, [tuple(map(torch.tensor, pair)) for pair in pairs])
    if isinstance(found, str):
        return verdict(False, found)

    def mean_of(function):
        return [function(np.mean(a)) - function(np.mean(b)) for a, b in pairs]

    right = mean_of(genie_mini.psnr)
    if np.allclose(found, right, atol=0.01):
        return verdict(True, "")
    late = [np.mean([genie_mini.psnr(n) for n in a]) - np.mean([genie_mini.psnr(n) for n in b])
            for a, b in pairs]
    unclamped = [np.mean(-10 * np.log10(np.array(a) / 4096))
                 + np.mean(10 * np.log10(np.array(b) / 4096)) for a, b in pairs[::2]]
    wrongs = (
        ([-value for value in right],
         "the sign is turned: inferred minus random, so that a world that obeys gets a positive"
         " number"),
        (late,
         "you averaged PSNRs: a frame without a wrong pixel then counts for whatever the floor of"
         " the logarithm is. Average the wrong pixels first, then take one PSNR of each mean"),
        ([-value for value in late],
         "you averaged PSNRs, and took inferred from random: average the wrong pixels first, and"
         " subtract the random actions' PSNR from the inferred ones'"),
        ([np.mean(b) - np.mean(a) for a, b in pairs],
         "this is a difference of wrong pixels; take the PSNR of each mean, then subtract"),
        ([2 * value for value in right], "twice the right value: 10 log10 of an MSE, not 20"),
        ([value * np.log(10) for value in right],
         "that is the natural logarithm; decibels use base 10"))
    for values, advice in wrongs:
        if np.allclose(found, values, atol=0.01):
            return verdict(False, advice)
    if np.allclose(found[::2], unclamped, atol=0.01):
        return verdict(False, wrongs[1][1])
    return verdict(False, f"for wrong pixels {pairs[2][0]} and {pairs[2][1]} the means are 30 and"
                   f" 15, and the delta is {right[2]:.2f} dB; yours says {found[2]:.2f}")


def copy_baseline(student):
    """The error of a first frame kept for ever, at each later time."""
    frames = torch.zeros(2, 5, 64, 64, dtype=torch.uint8)
    for b in range(2):
        for t in range(5):                          # a bar that walks and grows; it comes back
            place = (0, 9, 20, 3, 0)[t] + 5 * b
            frames[b, t, 10:14 + t, place:place + 8] = 1
    try:
        found = student(frames.clone())
    except Exception as error:
        return verdict(False, f"your function raised {type(error).__name__}: {error}")
    if found is None:
        return verdict(False, "write the function first")
    try:
        found = torch.as_tensor(found).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return verdict(False, "return a tensor (T-1,) of wrong pixels")
    right = genie_mini.errors(frames[:, 1:], frames[:, :1]).mean(0).double()
    signed = frames.long()
    wrongs = (
        (genie_mini.errors(frames[:, 1:], frames[:, :-1]).mean(0),
         "you compare with the frame before: that copies the last real frame, which is the"
         " baseline one step ahead. A rollout has the first frame only: compare with [:, :1]"),
        (torch.cat([right.new_zeros(1), right]),
         "leave out frame 0: it is given, and would only flatter the baseline. T-1 values"),
        (right / 4096, "these are shares: sum over the pixels, do not average them"),
        (right * 2, "sum over the pixels, but average over the clips"),
        ((frames[:, 1:] - frames[:, :1]).sum((-2, -1)).double().mean(0),
         "uint8 wraps: 0 - 1 is 255. Compare with != instead of subtracting"),
        ((signed[:, 1:] - signed[:, :1]).sum((-2, -1)).double().mean(0),
         "a pixel that goes out cancels one that lights up: compare with !=, or take abs()"),
        (genie_mini.errors(frames[:, :-1], frames[:, -1:]).mean(0),
         "you compare with the last frame; the model starts from the first, [:, :1]"))
    if found.shape == right.shape and torch.allclose(found, right):
        return verdict(True, "")
    for values, advice in wrongs:
        if found.shape == values.shape and torch.allclose(found, values.double()):
            return verdict(False, advice)
    if tuple(found.shape) == (2, 4):
        return verdict(False, "one value for each time: average over the clips, dim 0")
    if found.shape != right.shape:
        return verdict(False, f"for frames (2, 5, 64, 64) return shape (4,), one value for each"
                       f" later frame, not {tuple(found.shape)}")
    return verdict(False, f"on a test clip the wrong pixels are {right.tolist()}; yours are"
                   f" {found.tolist()}")
