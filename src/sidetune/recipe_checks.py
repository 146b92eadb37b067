"""What cannot be asked of one run together, each with what to type instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidetune.errors import RecipeError
from sidetune.sides import SOLVED

if TYPE_CHECKING:
    from sidetune.recipe import ClipsRecipe, FeaturesRecipe, Recipe

BEST_OF_FOLDS = "train.select is 'best' and there are folds: the epoch would be chosen on what scores it"


def check_views(features: FeaturesRecipe) -> None:
    """Refuse an average over one view, and tiles that cut nothing.

    Raises:
        RecipeError: it is one.
    """
    if features.tiles == 1:
        raise RecipeError("features.tiles is 1, which is the image itself. Type: --set features.tiles=2")
    if features.average_views and not (features.views or features.tiles):
        raise RecipeError(
            "features.average_views is true and features.views is 0: there is one view, nothing to "
            "average. Type: --views 4 --average-views"
        )


def check_clips(recipe: Recipe) -> None:
    """Refuse what does not go together for clips.

    Raises:
        RecipeError: it does not.
    """
    clips, asked = recipe.clips, recipe.features
    if clips.frames is None:
        if clips != type(clips)():
            raise RecipeError("clips are described and clips.frames is not given. Type: --frames 8")
        return
    if clips.frames > clips.stored and not recipe.backbone.reads_clips:
        raise RecipeError(
            f"clips.frames is {clips.frames} and clips.stored {clips.stored}, expected as many or more. "
            f"Type: --frames-stored {clips.frames}"
        )
    given = [name for name in ("tiles", "views", "average_views") if getattr(asked, name)]
    if given:
        value = str(getattr(asked, given[0])).lower()
        raise RecipeError(
            f"features.{given[0]} is {value} and the samples are clips: views are of images. Leave it out; "
            "for the mean over several samplings of a clip type: --set clips.scored=3"
        )


def check_whole_clips(clips: ClipsRecipe, frames: int) -> None:
    """Refuse what a backbone that reads clips does not read.

    Raises:
        RecipeError: another number of frames, or squares.
    """
    if clips.frames != frames:
        raise RecipeError(
            f"the backbone reads {frames} frames of a clip at once, and "
            f"{'no clips are asked for' if clips.frames is None else f'clips.frames is {clips.frames}'}. "
            f"Type: --frames {frames}"
        )
    if clips.crops != 1:
        raise RecipeError(
            f"clips.crops is {clips.crops}, and the backbone reads whole frames. Type: --set clips.crops=1"
        )


def check_fleet(recipe: Recipe) -> None:
    """Refuse what cannot be asked of one run together.

    Raises:
        RecipeError: it is.
    """
    fleet = recipe.fleet
    if fleet.ensemble and fleet.members is None and fleet.folds is None:
        raise RecipeError(
            "fleet.ensemble is true and there is one member: nothing to choose from. "
            "Type: --ensemble --members 'lr=1e-3,3e-3;seed=0,1', or --ensemble --folds 5"
        )
    if fleet.own_order and fleet.members is None:
        raise RecipeError(
            "fleet.own_order is true and there is one member: no order to share. "
            "Type: --own-order --members 'seed=0,1'"
        )
    if fleet.folds is not None and recipe.train.select == "best":
        raise RecipeError(f"{BEST_OF_FOLDS}. Type: --set train.select=last")
    if fleet != type(fleet)() and recipe.side.name in SOLVED:
        raise RecipeError(
            f"side.name is {recipe.side.name!r}, which is solved, not trained: there are no members and no "
            "folds of it. Type: --side losa"
        )
