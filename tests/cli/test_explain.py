"""``hansfree explain``: what it writes, what it refuses, and that it goes on where it was stopped."""

import json
import re
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from hansfree.errors import UserError
from hansfree.explainers import LRP, GradientXInput
from hansfree.explaining import Request, _ahead, explain_images
from hansfree.explaining.folder import _coarser
from hansfree.explaining.images import Fitting, Source, find_images
from hansfree.explaining.look import class_numbers, explainer_of
from hansfree.models import load_model, save_model
from hansfree.report.gallery import PER_PAGE, Entry, Said, write_gallery
from hansfree.report.sheets import Column, Scale, Sheet, cell_corner, draw_sheet, rounded, sheet_size, shortened

CLASSES = ("heron, wading bird", "crane, wading bird", "crane, machine", "tractor")


@pytest.fixture
def model(tmp_path):
    """An exported model of four classes for images of 20 x 24 pixels."""
    torch.manual_seed(0)
    network = load_model("small-cnn", num_classes=4, mean=(0.4, 0.5, 0.6), options={"widths": [4, 8], "norm": "none"})
    network.config["pretrained_cfg"]["input_size"] = [3, 20, 24]
    save_model(network, tmp_path / "model", classes=CLASSES)
    return tmp_path / "model"


def picture(path, seed=0, size=(30, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Four images, of which two share a name and two a stem."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(("a.png", "a.bmp", "sub/a.png", "sub/deep & <er>/b?.png")):
        picture(folder / name, seed)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image either")
    return folder


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def files(out):
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


# What is written ----------------------------------------------------------------------------------------------


def test_every_image_gets_a_picture_numbers_and_a_place_in_the_gallery(hansfree, model, photos, tmp_path):
    out = photos / "maps"  # inside the folder that is searched: its own pictures are no images to explain
    for _ in range(2):
        code, said, err = hansfree(
            "explain", model, photos, "--explainer", "lrp", "--explainer", "attention", "--out", out
        )
        assert code == 0, err
        assert err == ""  # no progress bar in a pipe
        stems = {"a", "a-2", "sub/a", "sub/deep & <er>/b?"}
        pages = {"index.html", "overview.png", "explain.json", "manifest.jsonl"}
        assert files(out) == pages | {f"pictures/{s}.png" for s in stems} | {f"maps/{s}.npz" for s in stems}
    assert "4 had been before" in said
    page = (out / "index.html").read_text(encoding="utf-8")
    links = set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', page))
    assert {unquote(link) for link in links} == files(out) - {"index.html", "explain.json", "manifest.jsonl"}
    assert "deep &amp; &lt;er&gt;" in page
    with Image.open(out / "pictures/a.png") as drawn:
        assert drawn.size == sheet_size(1, 2)


def test_the_numbers_are_those_of_the_explainers(hansfree, model, tmp_path):
    image = picture(tmp_path / "crane.png", size=(24, 20))
    code, _, err = hansfree(
        "explain", model, image, "--explainer", "gradient-x-input", "--explainer", "lrp:epsilon=0.1", "--top", "3",
        "--out", tmp_path / "maps",
    )  # fmt: skip
    assert code == 0, err
    network = load_model(str(model)).eval()
    input = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None].float() / 255
    target = network(input).topk(3).indices
    with np.load(tmp_path / "maps/maps/crane.npz") as found:
        assert (found["class_ids"] == target[0].numpy()).all()
        assert list(found["class_names"]) == [CLASSES[k] for k in target[0]]
        assert list(found["explainers"]) == ["gradient-x-input", "lrp:epsilon=0.1"]
        np.testing.assert_allclose(found["logits"], network(input)[0].detach(), rtol=1e-5)
        for name, explainer in (("gradient-x-input", GradientXInput()), ("lrp:epsilon=0.1", LRP(epsilon=0.1))):
            with torch.no_grad():
                np.testing.assert_allclose(found[name], explainer(network, input, target).map[0], rtol=1e-5, atol=1e-8)
    (line,) = manifest(tmp_path / "maps")
    share = network(input)[0].softmax(0)
    assert [said["probability"] for said in line["top"]] == pytest.approx(share[target[0]].tolist(), abs=1e-5)


def test_pictures_average_over_squares_and_numbers_do_not(model, tmp_path):
    file = picture(tmp_path / "photo.png")
    found = {}
    for coarse in (1, 4):
        request = Request(str(model), ("gradient-x-input", "attention"), coarse=coarse)
        explain_images(request, [file], tmp_path / f"maps{coarse}")
        with np.load(tmp_path / f"maps{coarse}/maps/photo.npz") as archive:
            drawn = (tmp_path / f"maps{coarse}/pictures/photo.png").read_bytes()
            found[coarse] = archive["gradient-x-input"], archive["attention"], drawn
    assert all(np.array_equal(a, b) for a, b in zip(found[1][:2], found[4][:2], strict=True))
    assert found[1][2] != found[4][2]
    fine = found[1][0].sum(1)
    squares = _coarser(fine, fine.shape[1:], 4)
    assert squares.shape == (1, 5, 6)
    assert squares[0, 1, 2] == pytest.approx(fine[0, 4:8, 8:12].mean(), rel=1e-5)
    assert _coarser(found[1][1].sum(1), fine.shape[1:], 4).shape == found[1][1].shape[:1] + found[1][1].shape[2:]


def test_batches_change_nothing(model, photos, tmp_path):
    request = Request(str(model), ("gradient-x-input",))
    for size in (1, 3):
        explain_images(request, [photos], tmp_path / f"by-{size}", batch_size=size)
    for name in ("a", "a-2", "sub/a"):
        one, three = (np.load(tmp_path / f"by-{size}/maps/{name}.npz")["gradient-x-input"] for size in (1, 3))
        np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-7)


def test_arrays_can_be_left_out_and_are_made_when_wanted(hansfree, model, photos, tmp_path):
    command = ("explain", model, photos / "a.png", "--out", tmp_path / "maps")
    assert hansfree(*command, "--no-arrays")[0] == 0
    assert not (tmp_path / "maps/maps").exists()
    assert hansfree(*command)[0] == 0
    assert (tmp_path / "maps/maps/a.npz").is_file()
    assert len(manifest(tmp_path / "maps")) == 2


# Classes and explainers ---------------------------------------------------------------------------------------


def test_classes_by_name_and_number(hansfree, model, photos, tmp_path):
    code, _, err = hansfree(
        "explain", model, photos / "a.png", "--class", "Tractor", "--class", "0", "--out", tmp_path / "maps"
    )
    assert code == 0, err
    assert [said["index"] for said in manifest(tmp_path / "maps")[0]["explained"]] == [3, 0]


def test_class_numbers():
    assert class_numbers(["heron", "crane, machine", "2", "3"], CLASSES, 4) == [0, 2, 3]
    assert class_numbers(["1"], (), 4) == [1]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("crane", "classes 1, 2"),
        ("wading bird", "classes 0, 1"),
        ("tracter", "did you mean 'tractor'"),
        ("4", "0 to 3"),
        ("-1", "0 to 3"),
    ],
)
def test_classes_that_are_not_there(hansfree, model, photos, tmp_path, asked, says):
    code, _, err = hansfree("explain", model, photos, "--class", asked, "--out", tmp_path / "maps")
    assert code == 2
    assert says in err
    assert not (tmp_path / "maps").exists()


def test_a_model_without_names_wants_numbers():
    with pytest.raises(UserError, match="number"):
        class_numbers(["cat"], (), 4)


def test_explainers_with_settings(tmp_path, monkeypatch):
    assert explainer_of("lrp:epsilon=[0.01, 0.1],output_factor=false") == LRP(epsilon=(0.01, 0.1), output_factor=False)
    assert explainer_of("gradient-x-input") == GradientXInput()
    (tmp_path / "my_maps.py").write_text("from hansfree.explainers import LRP as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert explainer_of("my_maps:Mine:epsilon=0.5") == LRP(epsilon=0.5)
    assert explainer_of("my_maps:Mine") == LRP()
    for text, says in (("lrp:epsilom=1", "epsilon"), ("lpr", "lrp"), ("=3", "form"), ("lrp:epsilon=-1", "positive")):
        with pytest.raises(UserError, match=says):
            explainer_of(text)


OBJECTOR = """
from dataclasses import dataclass
from typing import final

from hansfree.core import Explainer
from hansfree.errors import UserError

@final
@dataclass(frozen=True)
class Objector(Explainer):
    def __call__(self, model, input, target, *, draws=None):
        raise UserError("Objector has no rule for anything; take gradient-x-input.")
"""


@pytest.fixture
def objector(tmp_path, monkeypatch):
    (tmp_path / "my_objector.py").write_text(OBJECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_objector:Objector"


def test_who_refuses_alone_ends_it_before_anything_is_written(hansfree, model, photos, tmp_path, objector):
    code, _, err = hansfree("explain", model, photos, "--explainer", objector, "--out", tmp_path / "maps")
    assert code == 2
    assert "Objector has no rule" in err
    assert not (tmp_path / "maps").exists()


def test_who_refuses_among_others_says_why_in_its_column(hansfree, model, photos, tmp_path, objector):
    names = ("gradient-x-input", objector, "attention")
    chosen = [word for name in names for word in ("--explainer", name)]
    code, _, err = hansfree("explain", model, photos / "a.png", *chosen, "--out", tmp_path / "maps")
    assert code == 0
    assert "Objector has no rule" in err
    (line,) = manifest(tmp_path / "maps")
    assert list(line["refused"]) == [objector]
    assert "Objector has no rule" in (tmp_path / "maps/index.html").read_text()
    drawn = np.asarray(Image.open(tmp_path / "maps/pictures/a.png"))
    for column, coloured in ((1, True), (2, False), (3, True)):
        x, y = cell_corner(0, column)
        cell = drawn[y : y + 224, x : x + 224].astype(int)
        assert bool((cell.max(2) - cell.min(2)).max() > 60) is coloured
    assert list(np.load(tmp_path / "maps/maps/a.npz")["explainers"]) == ["gradient-x-input", "attention"]


# What cannot be read ------------------------------------------------------------------------------------------


def test_what_is_no_image_is_refused_before_anything_is_drawn(hansfree, model, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (photos / "sub" / "c.png").write_bytes(b"not a picture")
    for path, says in (
        (photos / "notes.txt", "notes.txt"),
        (photos / "missing.png", "missing.png"),
        (tmp_path / "empty", "no images"),
        (photos, "c.png"),
    ):
        code, out, err = hansfree("explain", model, photos / "a.png", path, "--out", tmp_path / "maps")
        assert (code, out) == (2, "")
        assert says in err
        assert not (tmp_path / "maps").exists()


def test_damaged_pixels_are_named_and_the_rest_is_done(hansfree, model, photos, tmp_path):
    torn = photos / "0-torn.png"
    torn.write_bytes(picture(photos / "whole.png", 9, (90, 90)).read_bytes()[:9000])
    out = tmp_path / "maps"
    code, _, err = hansfree("explain", model, photos, "--out", out)
    assert code == 1
    assert "0-torn.png cannot be read" in err and len(err.splitlines()) == 1
    assert len(list(out.glob("pictures/**/*.png"))) == 5
    picture(torn, 9)
    code, said, err = hansfree("explain", model, photos, "--out", out)
    assert (code, err) == (0, "")
    assert "1 image explained, 5 had been before" in said


# Going on -----------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_where_it_was_stopped(hansfree, model, photos, tmp_path):
    request, out = Request(str(model), ("gradient-x-input",)), tmp_path / "maps"

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_images(request, [photos], out, batch_size=1, watch=stop)
    assert len(manifest(out)) == 2
    with (out / "manifest.jsonl").open("a") as file:
        file.write('{"source": "torn li')
    before = {name: (out / name).stat().st_mtime_ns for name in files(out) if name.startswith("pictures")}
    summary = explain_images(request, [photos], out)
    assert (summary.skipped, len(summary.explained)) == (2, 2)
    assert len(manifest(out)) == 4
    done = [line["picture"] for line in manifest(out)[:2]]
    assert all((out / name).stat().st_mtime_ns == before[name] for name in done)


def test_what_changed_or_is_gone_is_made_again(model, photos, tmp_path):
    request, out = Request(str(model), ("gradient-x-input",)), tmp_path / "maps"
    explain_images(request, [photos], out)
    picture(photos / "a.png", 7)
    (out / "pictures/sub/a.png").unlink()
    summary = explain_images(request, [photos], out)
    assert sorted(entry.title for entry in summary.explained) == ["a.png", "sub/a.png"]
    assert len({entry["picture"] for entry in manifest(out)}) == 4


def test_a_folder_grows_and_names_never_meet(model, photos, tmp_path):
    request, out = Request(str(model), ("gradient-x-input",)), tmp_path / "maps"
    explain_images(request, [photos / "a.png"], out)
    kept = (out / "pictures/a.png").read_bytes()
    explain_images(request, [photos / "sub/a.png"], out)
    assert (out / "pictures/a.png").read_bytes() == kept
    assert len(list(out.glob("pictures/*.png"))) == 2
    assert (out / "index.html").read_text(encoding="utf-8").count('class="card"') == 2


def test_other_settings_need_another_folder_or_overwrite(hansfree, model, photos, tmp_path):
    out = tmp_path / "maps"
    assert hansfree("explain", model, photos, "--out", out)[0] == 0
    code, _, err = hansfree("explain", model, photos / "a.png", "--top", "2", "--out", out)
    assert code == 2
    assert "--overwrite" in err
    assert hansfree("explain", model, photos / "a.png", "--top", "2", "--out", out, "--overwrite")[0] == 0
    assert {name for name in files(out) if name.startswith(("pictures", "maps"))} == {"pictures/a.png", "maps/a.npz"}
    torch.manual_seed(5)
    network = load_model("small-cnn", num_classes=4, options={"widths": [4, 8], "norm": "none"})
    save_model(network, model, classes=CLASSES)
    code, _, err = hansfree("explain", model, photos / "a.png", "--top", "2", "--out", out)
    assert code == 2
    assert "weights" in err


def test_a_folder_of_something_else_is_left_alone(hansfree, model, photos):
    before = files(photos)
    code, _, err = hansfree("explain", model, photos / "a.png", "--out", photos)
    assert code == 2
    assert "other files" in err
    assert files(photos) == before


def test_no_more_than_a_few_images_are_under_way(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    taken = []

    def items():
        for number in range(500):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        for done, result in enumerate(_ahead(pool, lambda number: 2 * number, items(), 6)):
            assert result == 2 * done
            assert len(taken) - done <= 6
    assert len(taken) == 500


# Pixels -------------------------------------------------------------------------------------------------------


def fitting(**changes):
    given = {"size": (20, 24), "longest": 512, "channels": 3, "fit": "resize", "crop_share": 1.0}
    return Fitting(**{**given, "resampling": Image.Resampling.BILINEAR, **changes})


def read(path, **changes):
    found = fitting(**changes).read(Source(path, path.name))
    assert found.pixels is not None, found.error
    return found.pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_images_of_every_kind_come_in_the_models_channels(tmp_path, mode):
    path = picture(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), mode=mode)
    assert read(path).shape == (20, 24, 3)
    assert read(path, channels=1).shape == (20, 24, 1)


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    values = np.array([[0, 16384], [32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", size=None, channels=1)[..., 0].tolist() == [[0, 64], [128, 255]]


def test_a_camera_that_was_turned(tmp_path):
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    tags = Image.Exif()
    tags[0x0112] = 6  # turn clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=tags)
    turned = read(tmp_path / "x.png", size=None)
    assert turned.shape == (8, 4, 3)
    assert turned[:, -1].min() == 255 and turned[:, 0].max() == 0


def test_resize_squeezes_and_crop_cuts(tmp_path):
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, 40:80] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png", size=(40, 40))[20, :, 0].mean() == pytest.approx(85, abs=2)
    assert read(tmp_path / "x.png", size=(40, 40), fit="crop").min() == 255
    assert read(tmp_path / "x.png", size=None, longest=60).shape == (20, 60, 3)
    assert read(tmp_path / "x.png", size=None).shape == (40, 120, 3)


def test_sizes_that_contradict_the_model(hansfree, model, photos, tmp_path):
    code, _, err = hansfree("explain", model, photos, "--size", "30", "--out", tmp_path / "maps")
    assert code == 2
    assert "20 × 24" in err
    code, _, err = hansfree("explain", "small-cnn", photos, "--set", "num_classes=2", "--fit", "crop")
    assert code == 2
    assert "crop" in err


def test_a_model_of_one_channel_and_any_size(hansfree, tmp_path):
    images = [picture(tmp_path / f"{n}.png", n, (20 + n, 30)) for n in range(3)]
    settings = [word for pair in ("num_classes=2", "channels=1", "options.widths=[4]") for word in ("--set", pair)]
    command = ("explain", "small-cnn", *images, *settings, "--out", tmp_path / "maps")
    code, _, err = hansfree(*command)
    assert code == 0, err
    assert "random" in err and "random" in (tmp_path / "maps/index.html").read_text()
    assert [np.load(tmp_path / f"maps/maps/{n}.npz")["image"].shape for n in range(3)] == [
        (30, 20 + n, 1) for n in range(3)
    ]
    code, said, _ = hansfree(*command)  # random weights, but the same ones
    assert code == 0
    assert "3 had been before" in said


def test_each_file_once(photos, tmp_path):
    found = find_images([photos, photos / "a.png", photos / "sub"], tmp_path / "maps")
    assert [source.title for source in found] == ["a.bmp", "a.png", "sub/a.png", "sub/deep & <er>/b?.png"]
    (alone,) = find_images([photos / "sub/a.png"], tmp_path / "maps")
    assert alone.title == "a.png"


# Pictures and pages -------------------------------------------------------------------------------------------


def test_signed_maps_are_centred_on_zero_and_others_start_there():
    signed, amount = Scale.of(np.array([[-2.0, 1.0]])), Scale.of(np.array([[0.0, 1.0]]))
    assert signed.signed and not amount.signed
    grey = np.full((1, 3), 200.0)
    against, none, favour = signed.blend(grey, np.array([[-2.0, 0.0, 2.0]]))[0].astype(int)
    assert none.tolist() == [200, 200, 200]
    assert against[2] > against[0] and favour[0] > favour[2]
    first, middle, last = amount.blend(grey, np.array([[0.0, 0.5, 1.0]]))[0].astype(int)
    assert first.tolist() == [200, 200, 200] and middle.sum() > last.sum()
    assert Scale.of(np.zeros((2, 3, 3))).blend(grey, np.zeros((1, 3))).tolist() == [[[200, 200, 200]] * 3]


def cell_of(drawn, row, column):
    x, y = cell_corner(row, column)
    return np.asarray(drawn)[y : y + 224, x : x + 224].astype(int)


def test_a_map_lies_where_it_belongs_and_classes_share_a_scale():
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    maps = np.zeros((2, 2, 2))
    maps[0, 0, 1], maps[1, 0, 1], maps[1, 1, 0] = 1.0, 0.25, -0.25
    drawn = draw_sheet(Sheet("x.png", "", image, ["first", "second"], [Column("mine", maps)]))
    strong, weak = cell_of(drawn, 0, 1), cell_of(drawn, 1, 1)
    red = strong[..., 0] - strong[..., 2]
    assert red[:60, -60:].min() > 60 and abs(red[-60:, :60]).max() < 5
    assert 0 < (weak[..., 0] - weak[..., 2])[:60, -60:].mean() < red[:60, -60:].mean()
    assert (weak[..., 2] - weak[..., 0])[-60:, :60].min() > 12


def test_maps_that_are_not_numbers_are_said_to_be_so():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    drawn = draw_sheet(Sheet("x.png", "", image, ["first"], [Column("mine", np.full((1, 4, 4), np.nan))]))
    assert cell_of(drawn, 0, 1).std() > 1


def test_long_words_keep_their_ends():
    text = "a-rather-long-name-of-a-photograph.png"
    short = shortened(text, 12, 120)
    assert "…" in short and short.startswith("a-ra") and short.endswith(".png")
    assert shortened("short.png", 12, 120) == "short.png"
    assert [rounded(x) for x in (0.0214, 1430, 2.51e-6, 5.0, 123456.0)] == ["0.021", "1400", "2.5e-6", "5", "1.2e5"]


def test_thousands_of_images_become_many_small_pages(tmp_path):
    said = (Said(0, "cat", 0.9), Said(1, "dog", 0.1))
    entries = [
        Entry(f"/{n}.png", 1, 1, f"{n}.png", f"pictures/{n}.png", "", said, said[:1], {}) for n in range(10 * PER_PAGE)
    ]
    about = {"title": "Many", "version": "0", "facts": [("Images", "many")]}
    write_gallery(tmp_path, about, entries, ("lrp",), ())
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == 10 and not (tmp_path / "overview.png").exists()
    seen = set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.count("<img") == PER_PAGE and 'loading="lazy"' in text
        seen |= set(re.findall(r'<img[^>]*src="([^"]+)"', text))
        links = {link for link in re.findall(r'href="([^"]+)"', text) if link.endswith(".html")}
        assert len(links) <= 9 and all((tmp_path / link).is_file() for link in links)
    assert seen == {entry.picture for entry in entries}
    write_gallery(tmp_path, about, entries[: 2 * PER_PAGE], ("lrp",), ())
    assert {page.name for page in tmp_path.glob("*.html")} == {"index.html", "page-2.html"}


def test_a_finished_run_is_explained(hansfree, finished, tmp_path):
    code, said, err = hansfree(
        "explain", finished / "exported", picture(tmp_path / "x.png"), "--out", tmp_path / "maps"
    )
    assert (code, err) == (0, "")
    assert said.startswith("x.png: ")
    assert len(set(Image.open(tmp_path / "maps/pictures/x.png").convert("L").tobytes())) > 20
