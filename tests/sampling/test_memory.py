"""What an image takes, in closed form where there is one."""

import torch

from jlt.sampling.memory import peak_bytes

A = torch.ones(1000)  # 4,000 bytes, made before


def test_tensors_in_use_together_add_up() -> None:
    assert peak_bytes(lambda: [A * k for k in range(5)]) == 20_000


def test_a_chain_holds_two_at_a_time() -> None:
    assert peak_bytes(lambda: (((A + 1) + 1) + 1) + 1) == 8_000


def test_views_and_changes_in_place_take_nothing() -> None:
    assert peak_bytes(lambda: A.clone().view(10, 100).add_(1).T) == 4_000


def test_a_network_takes_as_much_more_as_its_batch_is_larger() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.SiLU(), torch.nn.Linear(100, 10))
    with torch.no_grad():
        one, seven = (peak_bytes(lambda n=n: layers(torch.ones(n, 10))) for n in (1, 7))  # type: ignore[misc]
    assert one == 4 * (10 + 2 * 100)  # input, hidden units before and after SiLU
    assert seven == 7 * one
