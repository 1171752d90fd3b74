"""The photographs of objects-on-scenes and accessories: which files of which packages they are, and what they show.

The files lie below ``ROOT/objects-on-scenes`` as the Debian packages lay them below ``/usr/share``, and
``hansfree data get objects-on-scenes`` puts them there. Named here are: cut-out photographs of animals on transparent
ground, by identity (several cut-outs of one animal, or of animals that can hardly be told apart, are one); scenes by
kind (two photographs of one place are one scene); and hats, which are drawings.

Left out. Cut-outs that are drawings or a toy, that carry grass or logs (the mask would show them), and the dolphin,
the orca and the whale, which are tinted by the water. Scenes that are drawings, show animals, or show two kinds.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hansfree.errors import UserError

DATA_SET = "objects-on-scenes"

_WATERBIRDS = """
    drake duck gander heron_greatblue+heron_greatblue_flying little-penguin magellanic_penguin pelican penguin
    pink_flamingo seagull silver-gull
"""
_LANDBIRDS = """
    adelaide-rosella blackbird chicken_profile crow crowned_crane cuckoo guineafowl helmeted_guineafowl hen lark magpie
    nandou ostrich owl peacock pigeon quetzal rainbow-lorikeet rooster tucan turkey vulture
"""
_MAMMALS = """
    apes/chimp apes/gorilla apes/tamarin_emperor aquatic/otter aquatic/sea_lion badger bears/bear bears/european-bear
    bovines/bison bovines/bull bovines/cow bovines/cow_white
    bovines/gnu-baby-stand+bovines/gnu-baby+bovines/gnu-sitting+bovines/gnu-stand
    bovines/goat bovines/indian_blackbuck bovines/mountaingoat bovines/ram bovines/sheep+bovines/sheep_lamb bovines/yak
    bovines/zebu camel/camel camel/dromedary cats/lion+cats/lion-2 cats/tiger deer/caribou deer/deer deer/doe
    deer/wapiti dogs/dingo dogs/dog elephant equines/donkey equines/donkey_eating equines/horse equines/zebra ferret
    giraffe hippopotamus pig pig_golden+pig_golden2 rhino_black rodents/beaver rodents/capybara rodents/marmot
    rodents/mouse rabbit_little+rodents/rabbit+rodents/rabbit-2 rodents/rat rodents/squirrel wildboar
"""
_MARSUPIALS = "kangaroo wombat"

_SCRATCH = "scratch/Media/Backgrounds"
_TEMPLATES = "tuxpaint/templates"
_WALLPAPERS = "wallpapers"

_SCENES = {
    "water": (
        f"{_SCRATCH}/Nature: beach-malibu.jpg wave.jpg",
        f"{_SCRATCH}/Outdoors: boardwalk.jpg city-with-water.jpg+city-with-water2.jpg pool.jpg",
        f"{_TEMPLATES}: ocean_splash.jpg ocean_waves.jpg",
        f"{_WALLPAPERS}: BytheWater ColdRipple DarkestHour EveningGlow summer_1am",
    ),
    "forest": (
        f"{_SCRATCH}/Nature: forest.jpg tree.jpg",
        f"{_TEMPLATES}: burnt_bark.jpg mossy_log.jpg redwoods_above.jpg sun_behind_leaves.jpg "
        "trees_above.jpg trees_at_dusk.jpg",
        f"{_WALLPAPERS}: FallenLeaf OneStandsOut Path",
    ),
    "urban": (
        f"{_SCRATCH}/Outdoors: brick-wall-and-stairs.jpg brick-wall2.jpg building-fireproof.jpg castle.jpg "
        "hallway_outdoors.jpg houses.jpg parking-ramp.jpg route66.jpg the-movies.jpg wooden-house.jpg",
        f"{_SCRATCH}/Sports: basketball-court1-a.jpg+basketball-court1-b.jpg tennis-backboard.jpg",
    ),
    "rock": (
        f"{_SCRATCH}/Nature: canyon.jpg grand-canyon.jpg gravel-desert.jpg hill.jpg moon.jpg",
        f"{_TEMPLATES}: cliff.jpg mudstone.jpg rocks.jpg",
    ),
    "grass": (
        f"{_SCRATCH}/Nature: garden-rock.jpg",
        f"{_SCRATCH}/Outdoors: building-at-mit.jpg driveway.jpg hay_field.jpg",
        f"{_SCRATCH}/Sports: football-field.jpg playing-field.jpg",
    ),
    "indoor": (
        f"{_SCRATCH}/Indoors: clothing-store.jpg hall.jpg kitchen.jpg the-movies-inside.jpg",
        f"{_TEMPLATES}: wool_mill_machine.jpg",
    ),
}
_HATS = "sombrero feathered_hat blue_fedora propeller_hat"


@final
@dataclass(frozen=True)
class Subject:
    """One animal, scene or hat: what it is called, of which kind it is, and its files below the data set's folder."""

    name: str
    kind: str
    files: tuple[str, ...]


def _subjects(kind: str, folder: str, names: str, ending: str) -> tuple[Subject, ...]:
    return tuple(
        Subject(Path(name.partition("+")[0]).stem, kind, tuple(f"{folder}/{one}{ending}" for one in name.split("+")))
        for name in names.split()
    )


def _scenes(kind: str, lines: Iterable[str]) -> tuple[Subject, ...]:
    found: tuple[Subject, ...] = ()
    for folder, _, names in (line.partition(": ") for line in lines):
        found += _subjects(kind, folder, names, "/contents/images/2560x1600.jpg" if folder == _WALLPAPERS else "")
    return found


_ANIMALS_FOLDER = "tuxpaint/stamps/animals"
ANIMALS = (
    *_subjects("waterbird", f"{_ANIMALS_FOLDER}/birds", _WATERBIRDS, ".png"),
    *_subjects("landbird", f"{_ANIMALS_FOLDER}/birds", _LANDBIRDS, ".png"),
    *_subjects("mammal", f"{_ANIMALS_FOLDER}/mammals", _MAMMALS, ".png"),
    *_subjects("mammal", f"{_ANIMALS_FOLDER}/marsupials", _MARSUPIALS, ".png"),
)
SCENES = tuple(scene for kind, lines in _SCENES.items() for scene in _scenes(kind, lines))
HATS = _subjects("hat", "tuxpaint/stamps/clothes/hats", _HATS, ".png")

FILES = tuple(sorted(file for subject in (*ANIMALS, *SCENES, *HATS) for file in subject.files))
"""Every file that is used, relative to the data set's folder."""

TASKS = {
    "bird/mammal": {"bird": ("waterbird", "landbird"), "mammal": ("mammal",)},
    "waterbird/landbird": {"waterbird": ("waterbird",), "landbird": ("landbird",)},
}
"""Classes of each task, and the kinds of animals that belong to each."""


def data_root() -> Path:
    """Where data are kept unless told: ``HANSFREE_DATA``, or hansfree's folder in the user's cache."""
    if told := os.environ.get("HANSFREE_DATA"):
        return Path(told).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "hansfree"


def photographs_folder(root: str | Path | None) -> Path:
    """The folder that holds ``FILES``: ``root``, or where ``hansfree data get`` puts it by default.

    Raises ``UserError`` where a file is missing.
    """
    folder = data_root() / DATA_SET if root is None else Path(root).expanduser()
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        what = "are not installed" if len(missing) == len(FILES) else f"lack {missing[0]}"
        remedy = "" if root is None else ", or set benchmark.root to the folder that it made"
        raise UserError(f"The photographs of {DATA_SET} {what} in {folder}; run: hansfree data get {DATA_SET}{remedy}.")
    return folder
