"""Runs of several label columns on their one backbone: an image is read once, all columns answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sidetune.backbones.base import Backbone
from sidetune.columns import column_folders
from sidetune.predict import Prediction, Predictor, answer_together, load


def load_columns_run(
    run: str | Path,
    *,
    num_views: int | None = None,
    backbone: Backbone | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    device: str = "auto",
) -> ColumnsPredictor:
    """Load what `fit_columns` finished, ready to predict. Arguments and errors are those of `load`.

    Args:
        run: a folder with columns.json.
        num_views: see `Predictor`.
        backbone: see `load`.
        weights: see `load`.
        precision: see `load`.
        device: see `load`.

    Raises:
        ArtifactError: not a finished folder of runs, damaged, or another backbone.
        RequestError: no such device, or weights that do not fit.
    """
    predictors: dict[str, Predictor] = {}
    for name, folder in column_folders(Path(run)).items():
        predictors[name] = load(
            folder,
            num_views=num_views,
            backbone=backbone,
            weights=weights,
            precision=precision,
            device=device,
        )
        backbone = predictors[name].backbone
    return ColumnsPredictor(predictors)


class ColumnsPredictor:
    """Trained sides of several label columns on one backbone.

    Args:
        predictors: column -> its own, all on one backbone object and of one reading.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        assert len({id(one.backbone) for one in predictors.values()}) == 1
        assert len({one.reading for one in predictors.values()}) == 1
        self.predictors = dict(predictors)

    @property
    def clips(self) -> bool:
        """Whether they answer for clips."""
        return next(iter(self.predictors.values())).clips

    def predict(
        self, paths: Sequence[str | Path], *, abstain_below: float | None = None
    ) -> dict[str, list[Prediction]]:
        """Column -> what its own `Predictor.predict` says, to the bit, in one pass over the images.

        Args:
            paths: of image files.
            abstain_below: as there, of every column.

        Raises:
            RequestError: as there.
        """
        own = list(self.predictors.values())
        for one in own:
            one.check_request(paths, abstain_below)
        values, bad = answer_together(own, [Path(path) for path in paths])
        return {
            name: one.in_words(paths, mine, bad, abstain_below)
            for (name, one), mine in zip(self.predictors.items(), values, strict=True)
        }
