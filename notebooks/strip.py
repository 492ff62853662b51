"""strip.py: hand out genie_mini with the bodies of some functions left for the students to write.

    python notebooks/strip.py patchify attention -o handout/

Signature, decorators and docstring of a function stay; its body becomes a NotImplementedError.
Every other line and file stays as it is, the tests too: `pytest -m patchify` then grades the work.
Only extras/test_class.py stays behind: it does the projects.
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("genie_mini.py", "data_prep.py", "test_genie_mini.py", "conftest.py", "requirements.txt",
          "README.md", "LICENSE", ".pytest.ini")
FOLDERS = ("extras", "assets", "notebooks")     # which the code imports and README links to
PARTS = {                           # the mark of pytest -> the functions of genie_mini.py to blank
    "patchify": ("patchify", "unpatchify"),
    "attention": ("Attention.forward",),
    "quantizer": ("VectorQuantizer.forward", "VectorQuantizer.update"),
    "straight_through": ("VectorQuantizer.forward",),
    "mask": ("DynamicsModel.random_mask",),
    "maskgit": ("DynamicsModel.sample",),
    "delta_psnr": ("evaluate_dynamics", "psnr"),
}


def functions(tree):
    """The functions of a module and the methods of its classes: {"Class.method": node}."""
    found = {}
    for node in tree.body:
        for part in [node] + getattr(node, "body", []):
            if isinstance(part, ast.FunctionDef):
                found[part.name if part is node else f"{node.name}.{part.name}"] = part
    return found


def blank(source, names):
    """The source with the bodies of the functions `names` replaced, all else as it was."""
    lines, found = source.split("\n"), functions(ast.parse(source))
    for name in sorted(names, key=lambda name: -found[name].lineno):    # from below: numbers hold
        body = found[name].body
        if ast.get_docstring(found[name]) is not None:
            first = body[0].end_lineno                  # the line after the docstring, from 0
        else:
            first = body[0].lineno - 1
            while lines[first - 1].lstrip()[:1] in ("#", ""):
                first -= 1                              # comments would give the answer away
        todo = f'raise NotImplementedError("your turn: {name}")'
        lines[first:body[-1].end_lineno] = [" " * body[0].col_offset + todo]
    return "\n".join(lines)


def main(argv=None):
    """Write the handout; returns the exit status: 0, or 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("-o", dest="out", required=True, metavar="FOLDER", type=Path)
    args = parser.parse_args(argv)
    try:
        unknown = [name for name in args.names if name not in PARTS]
        if unknown:
            raise ValueError(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"{args.out} exists and is not an empty folder: name another with -o")
        chosen = {function for name in args.names for function in PARTS[name]}
        source = blank((ROOT / COPIED[0]).read_text("utf-8"), chosen)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in COPIED[1:]:
            shutil.copyfile(ROOT / name, args.out / name)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, args.out / name,
                            ignore=shutil.ignore_patterns("__pycache__", ".*", "test_class.py"))
        (args.out / COPIED[0]).write_bytes(source.encode("utf-8"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: left to write: {', '.join(sorted(chosen))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
