"""Weights & Biases: live on its site, or with WANDB_MODE=offline as files in RUN/wandb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from d3po_bench.errors import UserError
from d3po_bench.training.tracking import Scalars, Tracked, Tracker

PROJECT = "d3po-bench"
"""Unless WANDB_PROJECT names another."""


class WandB(Tracker):
    """Sends while the run is in progress."""

    NEEDS = "wandb"

    @classmethod
    def require(cls) -> None:
        """Refuse to go online without a login.

        Raises:
            UserError: nobody is logged in.
        """
        import wandb

        with _told():
            settings = wandb.setup(wandb.Settings(silent=True)).settings
            if settings.mode == "online":
                wandb.login()

    def __init__(self, run: Tracked) -> None:
        """Begin a run there, or continue it.

        Raises:
            UserError: there is no login, or no connection.
        """
        import wandb

        super().__init__(run)
        with _told():
            quiet = wandb.Settings(silent=True, console="off", disable_git=True)
            self.run: Any = wandb.init(
                dir=run.folder.resolve(), project=wandb.setup().settings.project or PROJECT,
                name=run.name, id=_known(run), resume="allow", notes=run.command, settings=quiet,
                config={**run.settings, "command": run.command}, reinit="create_new",
            )  # fmt: skip
        # Its own count of steps would refuse rounds that come again.
        self.run.define_metric("*", step_metric="round")
        offline = f"kept here; to send it: wandb sync {Path(self.run.dir).parent}"
        self.where = self.run.url or offline

    def log(self, round_: int, scalars: Scalars, pictures: Mapping[str, Tensor]) -> None:
        """Send them in the background."""
        import wandb

        arrays = {prompt: p.permute(1, 2, 0).numpy() for prompt, p in pictures.items()}
        shown = [wandb.Image(array, caption=prompt) for prompt, array in arrays.items()]
        self.run.log({"round": round_, **scalars, **({"samples": shown} if shown else {})})

    def close(self, *, failed: bool) -> None:
        """Wait until all is sent."""
        self.run.finish(exit_code=int(failed))


def _known(run: Tracked) -> str | None:
    """The id that an earlier process gave the run, as the names of its files have it."""
    places = sorted((run.folder / "wandb").glob("*run-*-*"))
    return places[-1].name.rpartition("-")[2] if places and run.after is not None else None


@contextmanager
def _told() -> Iterator[None]:
    """Around what wandb may refuse.

    Raises:
        UserError: in one line.
    """
    import wandb

    try:
        yield
    except wandb.Error as problem:
        said = " ".join(str(problem).split())
        raise UserError(
            f"--track wandb cannot begin: {said} Log in with `wandb login`, or set "
            "WANDB_MODE=offline, which writes files alone."
        ) from problem


TRACKER = WandB
