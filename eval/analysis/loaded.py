"""Runs as data frames, for notebooks and scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d3po_bench.runs.run import find_runs
from eval.analysis.gains import records
from eval.analysis.runs import curves, read_groups

if TYPE_CHECKING:
    from eval.analysis.runs import Frame


@dataclass(frozen=True)
class Runs:
    """Runs in their folders; each call reads what is there now."""

    folders: tuple[Path, ...]
    """Of the runs, config.json in each."""

    def table(self) -> Frame:
        """A row for each objective and method, with every number of `report`'s gains and cost.

        Raises:
            UserError: a run has not ended, or the runs do not belong together.
        """
        import pandas as pd

        return pd.DataFrame(records(read_groups(self.folders)))

    def curves(self, x: str = "pairs") -> Frame:
        """The held-out score of every seed at each evaluation, training sampler.

        Args:
            x: rounds, pairs, images, scorer_calls, unet_forwards, unet_backwards, seconds, cpu,
                or how far the model has moved: drift, kl_trained or kl.

        Returns:
            Columns model, objective, method, seed, round, x, score (unit of the scorer), animal
            (probability), drift (variances of the noise), kl_trained and kl (nats per latent
            element); NaN where not known.

        Raises:
            UserError: a run does not know `x`, or the runs do not belong together.
        """
        groups = read_groups(self.folders, unfinished=True)
        return curves([run for members in groups.values() for run in members], x)

    def rows(self) -> Frame:
        """Every evaluation image of every run: the columns of eval.csv, and whose they are.

        Raises:
            UserError: a file is damaged.
        """
        import pandas as pd

        found = [
            {name: getattr(run.config, name) for name in ("model", "objective", "method", "seed")}
            | row
            for run in find_runs(self.folders)
            for row in run.evaluation
        ]
        return pd.DataFrame(found)
