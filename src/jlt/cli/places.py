"""What commands take by position, under the names that usage and complaints give it."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

RunPath = Annotated[Path, tyro.conf.arg(name="run", metavar="RUN"), Positional]
LatentsPath = Annotated[Path, tyro.conf.arg(metavar="LATENTS"), Positional]
OptionalLatentsPath = Annotated[Path | None, tyro.conf.arg(metavar="[LATENTS]"), Positional]
OutPath = Annotated[Path, tyro.conf.arg(metavar="OUT"), Positional]
SourceSpec = Annotated[str, tyro.conf.arg(metavar="SOURCE"), Positional]
