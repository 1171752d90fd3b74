import inspect
import json
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from scipy.io import savemat

from hansfree.benchmarks.coco_on_places import KINDS, OWN_SCENES
from hansfree.benchmarks.photographs import DATA_SET, FILES
from hansfree.cli import main
from hansfree.core import Batch, Benchmark, Classifier, InputSpec, Setup, Split, Teacher
from hansfree.explainers import LRP
from hansfree.methods import METHODS
from hansfree.models import load_model

settings.register_profile("untimed", deadline=None)  # how busy the machine is fails no test
settings.load_profile("untimed")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's children would ignore Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)


SHORT = {
    "sskd": {"projection_epochs": 1},
    "neuron-differentiation": {
        **{"warm_up_epochs": 1, "mask_epochs": 1, "fine_tune_epochs": 4, "rounds": 2},
        "iou_weight": 0.01,  # a term of ratios, which among a few hundred weights would outweigh all others
    },
}
"""Settings with which methods of several stages take steps in tiny networks, not minutes."""


class TinySplit(Split):
    """Random images whose class is a bright quadrant; everything that a batch can carry is there."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(count) % 3
        self.bias = torch.randint(3, (count,), generator=generator)
        self.images = torch.rand(count, 3, 12, 12, generator=generator) * 0.5
        self.mask = torch.zeros(count, 1, 12, 12)
        for i, y in enumerate(self.label.tolist()):
            rows, columns = slice(6 * (y // 2), 6 * (y // 2) + 6), slice(6 * (y % 2), 6 * (y % 2) + 6)
            self.images[i, :, rows, columns] += 0.5
            self.mask[i, :, rows, columns] = 1
        self.clean = torch.rand(count, 3, 12, 12, generator=generator)

    def batch(self, index, generator=None):
        return Batch(
            self.images[index],
            self.label[index],
            index,
            bias=None if self.bias is None else self.bias[index],
            mask=self.mask[index],
            clean=self.clean[index],
        )


class Tiny(Benchmark):
    """Three classes, 48 training samples; remembers which splits were asked for."""

    name = "tiny"
    classes = ("a", "b", "c")
    biases = ("x", "y", "z")
    mask_names = ("object",)
    gives = frozenset({"bias", "mask", "clean"})
    input = InputSpec(3, 12, 12)

    def __init__(self):
        self.asked = []

    def split(self, name):
        self.asked.append(name)
        seeds = {"train": 0, "valid": 1, "iid": 2, "ood": 3, "shift": 4, "valid_ood": 5}
        return TinySplit(48 if name == "train" else 24, seeds[name])


@pytest.fixture
def tiny():
    return Tiny()


@pytest.fixture
def build(tiny):
    """Builds a method by name on the tiny benchmark; ``norm`` is the networks', ``sees`` the teacher's input."""

    def made(name, *, norm="batch", teacher_norm=None, seed=0, sees="input", **settings):
        torch.manual_seed(0)
        teacher = network("small-resnet", norm=teacher_norm or norm)
        # A few steps in training mode, so that running statistics differ from those of a batch.
        for _ in range(3):
            teacher.train()(torch.rand(16, 3, 12, 12))
        torch.manual_seed(seed)
        settings = {**SHORT.get(name, {}), **settings}
        if wants_explainer(name):
            settings = {"explainer": LRP(epsilon=(0.01, 0.1)), **settings}
        train = tiny.split("train")
        setup = Setup(
            lambda: network("small-cnn", norm=norm),
            Teacher.live(teacher, sees),
            len(train),
            len(tiny.classes),
            tiny.input,
            label=train.label,
            bias=train.bias if "bias" in METHODS[name].needs else None,
        )
        return METHODS[name](setup, **settings)

    return made


def wants_explainer(name) -> bool:
    """Whether the method cannot be built without one."""
    parameter = inspect.signature(METHODS[name]).parameters.get("explainer")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def network(name, **options) -> Classifier:
    return load_model(name, num_classes=3, options={"widths": [4, 6], **options})


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A data root with tiny pictures where the packages lay their photographs: what a test without them reads."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for number, file in enumerate(FILES):
        path = root / DATA_SET / file
        path.parent.mkdir(parents=True, exist_ok=True)
        is_scene = "stamps" not in file
        height, width = (30, 40) if is_scene else (20 + number % 9, 18 + number % 7)
        colours = random.integers(40, 256, (height, width, 3), dtype=np.uint8)
        alpha = np.zeros((height, width, 1), np.uint8)
        alpha[2:-2, 3:-3] = 255
        pixels = colours if is_scene else np.concatenate([colours, alpha], 2)
        Image.fromarray(pixels).save(path, "PNG")
    return root


@pytest.fixture(scope="session")
def stanford_dogs(tmp_path_factory):
    """Three breeds of 8 training and 5 test images in the layout of Stanford Dogs, two ties, and marks for all."""
    root = tmp_path_factory.mktemp("dogs")
    random = np.random.default_rng(0)
    lists, marks = {"train": [], "test": []}, ["img_filename,x,y,scale,angle"]
    for breed in ("n02086079-Pekinese", "n02108551-Tibetan_mastiff", "n02085620-Chihuahua"):
        (root / "Images" / breed).mkdir(parents=True)
        for number in range(13):
            file = f"{breed}/{breed.partition('-')[0]}_{number}.jpg"
            Image.fromarray(random.integers(60, 200, (40, 60, 3), dtype=np.uint8)).save(root / "Images" / file)
            lists["train" if number < 8 else "test"].append(file)
            marks.append(f"{file},30,15,12,0")
    (root / "lists").mkdir()
    for part, files in lists.items():
        cells = np.empty((len(files), 1), dtype=object)
        cells[:, 0] = [np.array([file]) for file in files]
        savemat(root / f"lists/{part}_list.mat", {"file_list": cells, "annotation_list": cells})
    for name, size in (("bow-tie", (16, 8)), ("necktie", (8, 20))):
        Image.new("RGBA", size, (250, 20, 40, 255)).save(root / f"{name}.png")
    (root / "marks.csv").write_text("\n".join(marks) + "\n")
    return root


@pytest.fixture(scope="session")
def coco_and_places(tmp_path_factory):
    """Small pictures in the layouts of COCO and Places365: per class 9 large objects and 2 that are not."""
    root = tmp_path_factory.mktemp("coco-places")
    random = np.random.default_rng(0)
    told = {"categories": [{"id": 3 * i + 1, "name": name} for i, name in enumerate((*OWN_SCENES, "motorcycle"))]}
    told |= {"images": [], "annotations": []}
    (root / "coco/train2017").mkdir(parents=True)

    def annotate(image, category, area, **more):
        polygon = [[4, 3, 15, 3, 15, 12, 4, 12]]
        own = {"id": len(told["annotations"]), "image_id": image, "category_id": 3 * category + 1, "area": area}
        told["annotations"].append({**own, "iscrowd": 0, "segmentation": polygon, **more})

    for number in range(11 * len(OWN_SCENES)):
        category, kind = number // 11, number % 11
        file = f"{number:012d}.jpg"
        told["images"].append({"id": number + 100_000, "file_name": file, "width": 20, "height": 16})
        Image.fromarray(random.integers(60, 200, (16, 20, 3), dtype=np.uint8)).save(root / "coco/train2017" / file)
        annotate(number + 100_000, category, 9_000.5 if kind in (1, 4) else 12_000)
        if kind == 4:  # a region of many is the only large one
            runs = {"size": [16, 20], "counts": [16 * 4, 16 * 8, 16 * 8]}
            annotate(number + 100_000, category, 20_000, iscrowd=1, segmentation=runs)
        if kind in (6, 9):  # another class is here as well, and so is a smaller one of the same
            annotate(number + 100_000, (category + 1) % 9, 11_000)
            annotate(number + 100_000, category, 10_500)
    (root / "coco/annotations").mkdir()
    (root / "coco/annotations/instances_train2017.json").write_text(json.dumps(told))
    for kind in KINDS:
        folder = root / "data_256" / kind[0] / kind
        folder.mkdir(parents=True)
        for number in range(14):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number:08d}.jpg")
    return {"coco": root / "coco", "places": root / "data_256"}


@pytest.fixture(scope="session")
def waterbirds(tmp_path_factory):
    """44 birds in the layout of group_DRO, with CUB's segmentations: two of 20 training images are conflicting."""
    above = tmp_path_factory.mktemp("waterbirds")
    random = np.random.default_rng(0)
    places = {0: lambda y, turn: y if turn < 9 else 1 - y, 1: lambda y, turn: turn % 2, 2: lambda y, turn: turn % 2}
    counts = {0: 10, 1: 4, 2: 8}
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    birds = [(split, y, turn) for split, count in counts.items() for y in (0, 1) for turn in range(count)]
    for number, (split, y, turn) in enumerate(birds, start=1):
        species = ("014.Indigo_Bunting", "001.Black_footed_Albatross")[y]
        file = f"{species}/{species.partition('.')[2]}_{number:04d}"
        place = places[split](y, turn)
        size = (20 + number % 5, 16)
        for folder, ending in (("waterbird_complete95_forest2water2", "jpg"), ("segmentations", "png")):
            path = above / folder / f"{file}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (size[1], size[0], 3) if ending == "jpg" else (size[1], size[0])
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
        scene = ("/b/bamboo_forest/00000001.jpg", "/o/ocean/00000001.jpg")[place]
        lines.append(f"{number},{file}.jpg,{y},{split},{place},{scene}")
    (above / "waterbird_complete95_forest2water2/metadata.csv").write_text("\n".join(lines) + "\n")
    return above


@pytest.fixture(scope="session")
def labelled_names(tmp_path_factory):
    """Small BFFHQ and BAR as DFA ships them: names end with class and bias; two conflicting faces, six actions."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)

    def put(folder, count, label, bias, ending):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (12, 10 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}_{label}_{bias}.{ending}")

    for y in range(2):
        put(f"bffhq/0.5pct/align/{y}", 6, y, y, "png")
        put(f"bffhq/0.5pct/conflict/{y}", 1, y, 1 - y, "png")
        for bias in range(2):
            put("bffhq/valid", 4, y, bias, "png")
            put("bffhq/test", 4, y, bias, "png")
    for y in range(6):
        put(f"bar/train/align/{y}", 3, y, y, "jpg")
        put(f"bar/train/conflict/1pct/{y}", 1, y, (y + 1) % 6, "jpg")
        for bias in (y, (y + 2) % 6):
            put(f"bar/valid/{y}", 2, y, bias, "jpg")
            put(f"bar/test/{y}", 2, y, bias, "jpg")
    return root


@pytest.fixture(scope="session")
def x_rays(tmp_path_factory):
    """Chest X-rays of three classes: 10 internal patients each, those of pneumonia with two images; masks for all."""
    root = tmp_path_factory.mktemp("x-rays")
    random = np.random.default_rng(0)
    for part, count in (("internal", 10), ("external", 4)):
        for label, name in enumerate(("covid-19", "normal", "pneumonia")):
            files = [f"{part}/{name}/{number:03d}" for number in range(count)]
            if name == "pneumonia":
                files = [f"{file}/study{study}/frontal" for file in files for study in (1, 2)]
            for number, file in enumerate(files):
                size = (20 + number % 3, 18 + label)
                for folder, ending in (("", "jpg"), ("masks/", "png")):
                    path = root / f"{folder}{file}.{ending}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(random.integers(0, 256, size[::-1], dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """A folder with VOCdevkit of both years: bright blocks, each with its box, on black, up to three in an image."""
    root = tmp_path_factory.mktemp("voc")
    random = np.random.default_rng(0)
    kinds = ("dog", "person", "car", "bird")
    for year, counts in (("2007", {"train": 16, "val": 8, "test": 8}), ("2012", {"train": 20, "val": 8})):
        folder, number = root / "VOCdevkit" / f"VOC{year}", 0
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        for part, count in counts.items():
            names = [f"{number + n:06d}" for n in range(count)]
            (folder / f"ImageSets/Main/{part}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                number += 1
                pixels, objects = np.zeros((40, 50, 3), np.uint8), ""
                for turn in range(1 + number % 3):
                    x, y = (4, 5) if turn == 0 else random.integers(0, 20, 2)
                    pixels[y : y + 20, x : x + 20] = random.integers(180, 256, 3)
                    ends = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 20}</xmax><ymax>{y + 20}</ymax>"
                    kind = kinds[(number + turn) % 4]
                    objects += f"<object><name>{kind}</name><difficult>0</difficult><bndbox>{ends}</bndbox></object>"
                Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg", quality=95)
                size = "<size><width>50</width><height>40</height><depth>3</depth></size>"
                (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return root


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """Three classes of 14 training and 3 validation images in the layout of ImageNet, val in folders of classes."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for number, wnid in enumerate(("n01440764", "n01443537", "n15075141")):
        names = {"train": [f"{wnid}_{26 * n + 3}" for n in range(14)]}
        names["val"] = [f"ILSVRC2012_val_{3 * n + number + 1:08d}" for n in range(3)]
        for part, own in names.items():
            (root / part / wnid).mkdir(parents=True)
            for name in own:
                pixels = random.integers(0, 256, (24 + number, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / wnid / f"{name}.JPEG")
    return root


@pytest.fixture(scope="session")
def sun397(tmp_path_factory):
    """Three classes of 14 images in the layout of SUN397: 8 of each in the first training list, 4 in its test list."""
    root = tmp_path_factory.mktemp("places") / "SUN397"
    random = np.random.default_rng(0)
    folders = ("a/abbey", "a/apartment_building/outdoor", "y/youth_hostel")
    lists = {"ClassName": [f"/{folder}" for folder in folders], "Training_01": [], "Testing_01": []}
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(14):
            name = f"{folder}/sun_{'abcdefghijklmn'[number] * 16}.jpg"
            Image.fromarray(random.integers(0, 256, (26, 20 + number, 3), dtype=np.uint8)).save(root / name)
            if number < 12:
                lists["Training_01" if number < 8 else "Testing_01"].append(f"/{name}")
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def pytest_addoption(parser):
    parser.addoption("--golden-update", action="store_true", help="record the golden losses anew")


@pytest.fixture
def hansfree(monkeypatch, capsys):
    """Runs the command in this process: ``code, out, err = hansfree("run", config)``."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hansfree", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
