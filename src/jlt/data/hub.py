"""Repositories of the Hugging Face Hub, through its client and into its own cache.

A repository is named ORG/NAME, or ORG/NAME@REVISION with a branch, a tag or a commit. Only the files asked for are
fetched, and nothing in them is executed.
"""

import re
from collections.abc import Callable
from pathlib import Path

from jlt.extras import needed
from jlt.nn import checkpoint

ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")


def parse(name: str) -> tuple[str, str | None] | None:
    """Return the repository and the revision that a name states, or None if it is no name of a repository."""
    match = ID.fullmatch(name)
    return None if match is None else (match[1], match[2])


def snapshot(
    repository: str,
    patterns: list[str],
    whole: Callable[[Path], object],
    revision: str | None = None,
    newest: bool = False,
) -> Path:
    """Return the folder of a repository's files in the cache, fetched if they are not there yet.

    Args:
        repository: ORG/NAME.
        patterns: the files, the first of them by its own name.
        whole: raises a ValueError for a folder that lacks some of them.
        revision: a branch, a tag or a commit; by default the main branch.
        newest: ask the Hub what the revision is now; otherwise what the cache holds of it will do.

    Raises what the client raises, or ValueError without it.
    """
    with needed("the Hub", "autoencoders"):
        from huggingface_hub import get_session, hf_hub_url, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(offline: bool) -> Path:
        root = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=offline))
        whole(root)
        return root

    try:
        if not newest:
            return fetch(offline=True)
    except (LocalEntryNotFoundError, ValueError):
        pass
    # one try: where there is no network, the client's own take half a minute
    get_session().head(hf_hub_url(repository, patterns[0], revision=revision), timeout=10)
    return fetch(offline=False)


def find_checkpoint(path: Path) -> Path:
    """Return the folder that a path names: itself, or what ORG/NAME or ORG/NAME@REVISION holds on the Hub.

    What is there, or lies in a folder that is there, is no repository. A repository without a revision is asked for its
    newest; with one, the cache will do. Of its files only weights, header and representation are fetched.
    """
    named = parse(str(path))
    if path.exists() or path.parent.is_dir() or named is None:
        return path
    repository, revision = named
    patterns = [checkpoint.HEADER, "model.safetensors", "ema-*.safetensors", "power-*.safetensors"]
    patterns += [f"representation/*.{kind}" for kind in ("json", "safetensors")]
    try:
        return snapshot(repository, patterns, check_whole, revision, newest=revision is None)
    except Exception as error:  # no network, no such repository, no permission, no client: all end here
        raise ValueError(f"{path} is neither a folder nor to be had from the Hub: {one_line(error)}") from None


def check_whole(folder: Path) -> None:
    """Raise a ValueError for a folder without a checkpoint's header, or without weights that it names."""
    for name in checkpoint.read(folder).header["files"]:
        if name != "optimizer.safetensors" and not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {checkpoint.HEADER} names it")


def one_line(error: Exception) -> str:
    """Return an error's message on one line of at most 200 characters, or its kind if it has none."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}"
