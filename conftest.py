"""Fixtures of all tests."""


import pytest
import torch

import data_prep as dp


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory):
    """One minute of the demo world: 37 windows, 111 sequences."""
    path = tmp_path_factory.mktemp("demo") / "demo.npz"
    assert dp.main(["demo", "-o", str(path), "--minutes", "1"]) == 0
    return path


@pytest.fixture(scope="session")
def ball_file(tmp_path_factory):
    """One minute of the ball world."""
    path = tmp_path_factory.mktemp("ball") / "ball.npz"
    assert dp.main(["demo", "--world", "ball", "-o", str(path), "--minutes", "1"]) == 0
    return path


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
