"""Shapes stated in signatures are checked in every test (not in `nn`, whose network is also compiled)."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["jlt.flow", "jlt.data", "jlt.sampling", "jlt.evaluation"], "beartype.beartype")

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference vectors computed with the authors' code; tests fail where they are absent."""
    folder = Path(__file__).parent / "golden"
    assert (folder / "jlt_p1" / "vectors.safetensors").is_file(), f"the reference vectors are missing in {folder}"
    return folder


FORK = """
import os, socket, sys, traceback
os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun sets it; a pool of threads does not survive a fork

def forked(count, work):
    "Call work(rank) in so many processes that torchrun could have started; return their exit codes in order."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                work(rank)
                code = 0
            except (ValueError, KeyboardInterrupt) as error:  # the second is how a training says that it was stopped
                os.write(1, f"{rank} {error}\\n".encode())  # at once: the others write there too
                code = 2 if isinstance(error, ValueError) else 130
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    ended = {}
    while len(ended) < count:
        child, status = os.wait()
        ended[child] = os.waitstatus_to_exitcode(status)
        if ended[child] not in (0, 2, 130):  # as torchrun does; the others would wait for it
            for other in set(children) - set(ended):
                os.kill(other, 9)
    return [ended[child] for child in children]
"""


@pytest.fixture(scope="session")
def fork() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program that may call `forked(count, work)`: processes as torchrun starts them, without its imports."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-c", FORK + program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as forked processes do: with more, sums come in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
