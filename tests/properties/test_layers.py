"""Twins share everything and touch nothing; the feature map is found, or its absence is said, on every kind of net."""

import copy
import gc
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from hansfree.core import Classifier
from hansfree.errors import UserError
from hansfree.explainers import Attention, BCos, FeatureMap, GradCAM
from hansfree.explainers.twin import layer_named, twin
from hansfree.models.small import SmallCNN
from hansfree.torchvision_guard import import_torchvision

models = import_torchvision("torchvision.models")  # before timm and open_clip, which import it too

TARGET = torch.tensor([1, 0])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * float(b.detach().abs().max()))


class Bend(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def around(*middle: nn.Module, channels: int = 6) -> nn.Sequential:
    """conv, what is given, global pooling, linear."""
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *middle, *pooled).eval()


# Twins.


def state(model: nn.Module) -> list:
    """Every attribute of every module, by identity."""
    return [
        (name, key, id(value), dict(value) if isinstance(value, dict) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]


def test_a_twin_shares_all_but_the_changed_layer_and_its_containers():
    model = models.resnet18(num_classes=4)
    layer, before = model.layer4[1].conv2, state(model)
    changed = twin(model, {layer: lambda other: setattr(other, "stride", 7)})
    assert state(model) == before and layer.stride == (1, 1) and changed.layer4[1].conv2.stride == 7
    assert all(a is b for a, b in zip(model.parameters(), changed.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), changed.buffers(), strict=True))
    copied = {name for name, module in changed.named_modules() if module is not model.get_submodule(name)}
    assert copied == {"", "layer4", "layer4.1", "layer4.1.conv2"}
    assert all(type(changed.get_submodule(name)) is type(model.get_submodule(name)) for name in copied)
    assert twin(model, {}) is model


def test_a_layer_in_two_places_is_one_copy():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.ReLU()), "b": nn.ModuleList([nn.Sequential(layer)])})
    changed = twin(model, {layer: lambda other: setattr(other, "mark", 1)})
    assert changed["a"][0] is changed["b"][0][0] is not layer and not hasattr(layer, "mark")
    assert layer_named(model, "a.0") is layer_named(model, "b.0.0") is layer


@pytest.mark.parametrize("norm", ["batch", "scale"])
def test_buffers_move_in_the_original(norm):
    model = SmallCNN(4, widths=(4, 5), norm=norm).train()
    other = copy.deepcopy(model)
    for layer in ("norms.1", "norms.0", "convs.0"):
        model(images())
        GradCAM(layer)(other, images(), TARGET)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer)


@pytest.mark.parametrize("explainer", [GradCAM("0", relu=False), FeatureMap("0"), Attention(2, "0")])
@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), Bend(lambda x: x.mul_(2).add_(1))])
def test_a_layer_is_seen_as_it_was_before_the_next_worked_in_place(explainer, after):
    other = nn.ReLU() if isinstance(after, nn.ReLU) else Bend(lambda x: x * 2 + 1)
    model = around(after)
    expected = explainer(nn.Sequential(model[0], other, *model[2:]), images(), TARGET)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            found = explainer(model, images(), TARGET)
        close(found.map, expected.map)
        close(found.logits, model(images()))


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, None), lambda given: given[0]),
        (lambda x: [None, x], lambda given: given[1]),
        (lambda x: {"loss": None, "map": (x, 1)}, lambda given: given["map"][0]),
        (lambda x: Pair(x, x.sum()), lambda given: given.first + 0 * given.second),
    ],
)
def test_an_output_of_several_parts_means_its_first_tensor(wrap, unwrap):
    model = around(Bend(wrap), Bend(unwrap))
    plain = around()
    plain.load_state_dict({name.replace("5", "3"): value for name, value in model.state_dict().items()})
    close(GradCAM("1")(model, images(), TARGET).map, GradCAM("0")(plain, images(), TARGET).map)


def test_a_layer_called_twice_counts_at_its_last_call():
    shared = nn.Conv2d(6, 6, 3, padding=1)
    model, unshared = around(shared, nn.Tanh(), shared), around(shared, nn.Tanh(), copy.deepcopy(shared))
    unshared[-1].load_state_dict(model[-1].state_dict())
    unshared[0].load_state_dict(model[0].state_dict())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            close(GradCAM("1")(model, images(), TARGET).map, GradCAM("3")(unshared, images(), TARGET).map)


def test_nothing_before_a_constant_map_builds_a_graph():
    """Neither at a named layer nor where forward_features tells the place."""
    modes = []

    class Noting(SmallCNN):
        def forward_features(self, x: Tensor) -> Tensor:
            modes.append(torch.is_grad_enabled())
            return super().forward_features(x)

    with torch.no_grad():
        small = Noting(4, widths=(4, 5)).eval()
        map = GradCAM()(small, images(), TARGET).map
        noting = Bend(lambda x: modes.append(torch.is_grad_enabled()) or x)
        GradCAM("2")(around(noting, nn.ReLU()), images(), TARGET)
    assert modes == [False, False]
    close(map, GradCAM()(small, images(), TARGET).map)
    assert modes[2:] == [True]


def test_names_may_leave_wrappers_out():
    network = SmallCNN(4, widths=(4, 5)).eval()
    expected = GradCAM("convs.1")(network, images(), TARGET).map
    wrapped = {
        "classifier": Classifier(network, {}),
        "compiled": torch.compile(network),
        "compiled classifier": torch.compile(Classifier(network, {})),
        "parallel": nn.DataParallel(network),
        "parallel classifier": nn.DataParallel(Classifier(network, {})),
    }
    for model in wrapped.values():
        assert torch.equal(GradCAM("convs.1")(model, images(), TARGET).map, expected)
    assert torch.equal(GradCAM("network.convs.1")(wrapped["classifier"], images(), TARGET).map, expected)
    network.convs[1].compile()
    assert torch.equal(GradCAM("convs.1")(network, images(), TARGET).map, expected)


def test_a_distributed_wrapper_still_gathers_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = SmallCNN(4, widths=(4, 5))
        expected = copy.deepcopy(network)
        model = nn.parallel.DistributedDataParallel(network)
        for _ in range(2):
            for each in (model, expected):
                logits, map = GradCAM("norms.1")(each, images(), TARGET)
                (logits.square().sum() + map.square().sum()).backward()
        for found, other in zip(network.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found.grad, other.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_of_the_user_run_once_and_stay():
    model, calls = around(nn.ReLU()), []
    model[0].register_forward_hook(lambda *_: calls.append("layer"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    GradCAM("0")(model, images(), TARGET)
    assert calls == ["layer", "model"] and len(model[0]._forward_hooks) == len(model._forward_hooks) == 1


def test_threads_may_watch_different_layers_of_one_model():
    model = SmallCNN(4, widths=(4, 5, 6)).eval()
    before = state(model)
    explainers = [GradCAM(), *(GradCAM(f"{kind}.{n}") for kind in ("convs", "norms") for n in range(3))]
    serial = [explainer(model, images(), TARGET).map for explainer in explainers]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda n: explainers[n % 7](model, images(), TARGET).map, range(28)))
    assert all(torch.equal(found, serial[n % 7]) for n, found in enumerate(parallel))
    assert state(model) == before


class Aligned(nn.Conv2d):
    """A B-cos layer with a flag, as the ``bcos`` package has it."""

    def __init__(self) -> None:
        super().__init__(6, 6, 1, bias=False)
        self.detach = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        cosine = y.abs() / x.norm(dim=1, keepdim=True)
        return y * (cosine.detach() if self.detach else cosine)


@pytest.mark.parametrize(
    "explainer",
    [GradCAM(), GradCAM("1"), GradCAM("2"), FeatureMap("2"), Attention(), BCos(), BCos("contributions")],
    ids=str,
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_activations_are_given_back_at_once(explainer, mode):
    """Without waiting for the garbage collector, which knows nothing of a GPU's memory."""
    seen = []

    def noted(x: Tensor) -> Tensor:
        y = x.exp()
        seen.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (x, y))
        return y

    network = around(Aligned(), Bend(noted))
    network[0] = nn.Conv2d(6, 6, 3)
    model = Classifier(network, {}, encoding="six-channels").eval()
    gc.disable()
    try:
        with mode():
            found = explainer(model, images(), TARGET)
        assert len(seen) == 2 and found.map.any()
        del found
        assert all(activation.expired() for activation in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("model", "layer", "match"),
    [
        (around(), "fcc", "no layer 'fcc'; known: 0, 1, 2, 3"),
        (models.resnet18(), "layr4", "did you mean 'layer4'"),
        (around(), "", "no layer ''"),
        (around(), "3", r"shape \[2, 4\], which is no feature map"),
        (around(Bend(lambda x: ((), x.tolist())), Bend(lambda given: torch.tensor(given[1]))), "1", "gives no tensor"),
        (SmallCNN(4, widths=(4, 5)), "convs", "was not called"),
    ],
)
def test_a_wrong_layer_is_a_user_error(model, layer, match):
    for explainer in (GradCAM(layer), FeatureMap(layer), Attention(layer=layer)):
        with pytest.raises(UserError, match=match):
            explainer(model, images(), TARGET)


def test_scripted_modules_cannot_be_watched():
    with pytest.warns(DeprecationWarning):
        model = torch.jit.script(around(nn.ReLU()))
    with pytest.raises(UserError, match=r"scripted .* torch\.jit\.script"):
        GradCAM("0")(model, images(), TARGET)
    with pytest.raises(UserError, match="no feature map"):
        GradCAM()(model, images(), TARGET)
    with pytest.raises(UserError, match="no B-cos layer"):
        BCos()(model, images(), TARGET)


# The automatic choice.


def grid_of(model: nn.Module, x: Tensor) -> list[int]:
    logits, map = GradCAM(relu=False)(model.eval(), x, TARGET)
    torch.testing.assert_close(logits, model(x))
    assert map.any()
    with torch.no_grad():
        close(GradCAM(relu=False)(model, x, TARGET).map, map)
    return list(map.shape[2:])


def alike(model: nn.Module, layer: str, x: Tensor) -> None:
    """The automatic choice is the layer of that name."""
    found, named = GradCAM(relu=False)(model.eval(), x, TARGET), GradCAM(layer, relu=False)(model, x, TARGET)
    assert named.map.any()
    close(found.map, named.map)
    close(FeatureMap()(model, x, TARGET).map, FeatureMap(layer)(model, x, TARGET).map)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer4"),
        ("squeezenet1_1", "classifier.2"),
        ("mobilenet_v3_small", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("regnet_y_400mf", "trunk_output"),
    ],
)
def test_the_last_map_of_torchvisions_networks(name, layer):
    alike(models.get_model(name, num_classes=4), layer, images(64, 64))


def test_functions_count_as_layers():
    """DenseNet rectifies its last map with a function."""
    model = models.DenseNet(4, (1, 1), 8, num_classes=4).eval()
    features = F.relu(model.features(images(64, 64)))
    close(FeatureMap()(model, images(64, 64), TARGET).map, features)
    assert grid_of(model, images(64, 48)) == [8, 6]


def test_the_sharper_map_before_an_adaptive_pooling_is_taken():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 4))
    assert grid_of(model, images()) == [16, 16]


def test_maps_of_one_pixel_and_maps_that_are_cut_off_are_passed_over():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())
    model = around(Bend(lambda x: x * gate(x) + 0 * x.relu().detach().mean()), nn.AvgPool2d(16))
    assert grid_of(model, images()) == [16, 16]


def transformer(**settings) -> nn.Module:
    import timm

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **settings}
    return timm.models.VisionTransformer(num_classes=4, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"img_size": (16, 32)},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"qk_norm": True},
        {"global_pool": "map"},
        {"pre_norm": True, "final_norm": False},
    ],
    ids=str,
)
def test_the_patches_of_vision_transformers(settings):
    model = transformer(**settings)
    x = images(*settings.get("img_size", (16, 16)))
    assert grid_of(model, x) == [2, x.shape[-1] // 8]
    layer = "norm" if settings.get("global_pool") == "map" else "blocks.1.norm1"
    close(GradCAM(relu=False)(model, x, TARGET).map, GradCAM(layer, relu=False)(model, x, TARGET).map)


@pytest.mark.parametrize("fused", [False, True])
def test_attention_by_matrix_products_is_attention(fused):
    model = transformer().eval()
    expected = GradCAM()(model, images(), TARGET).map
    for block in model.blocks:
        block.attn.fused_attn = fused
    close(GradCAM()(model, images(), TARGET).map, expected)


def test_torchvisions_transformers():
    model = models.VisionTransformer(16, 8, 2, 2, 24, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    x = images()
    close(
        GradCAM(relu=False)(model.eval(), x, TARGET).map,
        GradCAM("encoder.layers.encoder_layer_1.ln_1", relu=False)(model, x, TARGET).map,
    )
    swin = models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=4)
    alike(swin, "permute", images(32, 32))
    close(GradCAM()(swin, images(32, 32), TARGET).map, GradCAM("norm")(swin, images(32, 32), TARGET).map)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_clips_image_towers(tower):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = CLIPTextCfg(context_length=8, vocab_size=16, width=8, heads=2, layers=1)
    sizes = {"vit": {"layers": 2, "width": 64, "patch_size": 8}, "resnet": {"layers": (1, 1, 1, 1), "width": 4}}
    model = CLIP(8, CLIPVisionCfg(image_size=64, **sizes[tower]), text).visual.eval()
    layer = {"vit": "transformer.resblocks.1.ln_1", "resnet": "layer4"}[tower]
    if tower == "resnet":  # open_clip starts the last norm of each block at zero
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
    alike(model, layer, images(64, 64))
    assert grid_of(model, images(64, 64)) == {"vit": [8, 8], "resnet": [2, 2]}[tower]


def test_tokens_first_is_a_layout_too():
    """[n, b, c], as older transformers have it."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).permute(2, 0, 1)
            x = torch.cat([x[:1] * 0, x])
            y = self.norm(x)
            return self.head((x + self.attention(y, y, y)[0])[0])

    model, x = Old().eval(), images(16, 24)
    found = GradCAM(relu=False)(model, x, TARGET).map
    many = GradCAM(relu=False)(model, x, torch.stack([TARGET, TARGET], 1)).map
    assert found.shape == (2, 1, 2, 3) and many.shape == (2, 2, 1, 2, 3)
    close(many[:, 1], found)
    normed = model.norm(model.patches(x).flatten(2).permute(2, 0, 1))
    close(FeatureMap()(model, x, TARGET).map[:, :, 1, 2], normed[5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "grid"),
    [
        ("convnext_atto", {}, 64, [2, 2]),
        ("swin_tiny_patch4_window7_224", {}, 224, [7, 7]),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 56, [4, 4]),
        ("vit_base_patch16_siglip_224", {"img_size": 64}, 64, [4, 4]),
        ("cait_xxs24_224", {"img_size": 64}, 64, [4, 4]),
        ("mobilevit_xxs", {}, 64, [2, 2]),
        ("pvt_v2_b0", {}, 64, [2, 2]),
        ("coatnet_pico_rw_224", {}, 224, [7, 7]),
        ("xcit_nano_12_p16_224", {}, 64, [4, 4]),
        ("botnet26t_256", {}, 256, [8, 8]),
        ("maxvit_rmlp_pico_rw_256", {}, 256, [8, 8]),
        ("davit_tiny", {}, 64, [2, 2]),
    ],
)
def test_timms_families(name, options, size, grid):
    import timm

    model = timm.create_model(name, num_classes=4, **options)
    assert grid_of(model, images(size, size)) == grid


@pytest.mark.slow
def test_hugging_faces_transformers():
    transformers = pytest.importorskip("transformers")

    class Logits(nn.Module):
        def __init__(self, network) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(pixel_values=x).logits

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for kind in ("eager", "sdpa"):
        config = transformers.ViTConfig(**small, image_size=64, patch_size=16, num_labels=4, attn_implementation=kind)
        model = Logits(transformers.ViTForImageClassification(config))
        alike(model, "vit.layers.1.layernorm_before", images(64, 64))
        assert grid_of(model, images(64, 64)) == [4, 4]
        features = FeatureMap("vit.layers.1")(model, images(64, 64), TARGET).map  # gives no plain tensor
        assert features.shape == (2, 32, 4, 4)


# What cannot be known is said.


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 4))


class Unnormed(nn.Module):
    """Attention twice, to tokens that no norm announces."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            x = x + F.scaled_dot_product_attention(x, x, x)
        return self.head(x.mean(1))


class Seven(nn.Module):
    """Seven normed tokens of no image grid."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(768, 56), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(x.flatten(1)).view(-1, 7, 8)).mean(1))


@pytest.mark.parametrize("explainer", [GradCAM(), FeatureMap(), Attention()])
@pytest.mark.parametrize(
    ("build", "match"),
    [(perceptron, "no feature map .* `layer`"), (Unnormed, "no feature map .* `layer`"), (Seven, "7 tokens")],
)
def test_networks_whose_feature_map_cannot_be_known_are_refused(explainer, build, match):
    with pytest.raises(UserError, match=match):
        explainer(build(), images(), TARGET)


def test_a_layer_whose_patches_have_no_part_in_the_logits_is_refused():
    """Behind the last attention only the class token is read, and a map of zeros would say nothing."""
    model = transformer()
    with pytest.raises(UserError, match="class token"):
        GradCAM("blocks.1")(model, images(), TARGET)
    with pytest.raises(UserError, match="do not depend"):
        GradCAM("aux")(WithAside(), images(), TARGET)


class WithAside(nn.Module):
    """A layer whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.aux = around(), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aux(x)
        return self.trunk(x)
