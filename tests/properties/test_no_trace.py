"""Explaining leaves nothing behind, disturbs nobody, and is never silently wrong where it cannot look inside.

``LRP`` needs to see every function of a network. What hides functions (scripts, compilers, functions and operators of
one's own, functorch) must either come out right or be refused by name. Gradient explainers need no rules, so there
the measure is plain autograd.
"""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

from hansfree.core import Explainer, held_affine
from hansfree.errors import UserError
from hansfree.explainers import EXPLAINERS, LRP, GradientXInput, InputGradient

TARGET = torch.tensor([0, 2, 1])


class BcosConv(nn.Module):
    """A convolution scaled by how well its input aligns with its weights: the scale is held while explaining."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        size = F.avg_pool2d(x.square().sum(1, keepdim=True), 3, 1, 1, divisor_override=1).add(1e-6).sqrt()
        return held_affine(y, y.abs() / size)


class Network(nn.Module):
    """conv - batch norm - ReLU - pool - B-cos convolution - in-place ReLU - dropout - linear, with timm's parts."""

    def __init__(self, bend: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bend = bend or nn.ReLU()
        self.pool, self.conv2 = nn.MaxPool2d(2), BcosConv(4, 5)
        self.relu, self.drop, self.fc = nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(5, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.pool(self.bend(self.norm(self.conv1(x))))))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.drop(features.mean((2, 3))))

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Plain(nn.Module):
    """Two convolutions, batch norm, two activations: what plain autograd explains as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.last, self.fc = nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.act(self.norm(self.conv1(x))))
        return self.fc(self.last(x).mean((2, 3)))


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def seeded(build, seed: int = 0) -> nn.Module:
    """What ``build`` makes, in float64 and evaluation mode, with weights and statistics that matter."""
    torch.manual_seed(seed)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.double().eval()


def images(seed: int = 1) -> Tensor:
    return torch.rand(3, 3, 10, 10, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=EXPLAINERS)
def explainer(request) -> Explainer:
    return EXPLAINERS[request.param]()


# What is left behind: nothing.


SWITCHES = {
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
    "autocast cache": torch.is_autocast_cache_enabled,
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "function modes": _get_current_function_mode_stack,
    "dispatch modes": torch._C._len_torch_dispatch_stack,
    "deterministic": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    ),
    "cudnn": lambda: [
        getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
    ],
    "matmul": lambda: (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
    "attention kernels": lambda: [
        getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
        for kernel in ("flash", "mem_efficient", "math", "cudnn")
    ],
    "oneDNN": lambda: torch.backends.mkldnn.enabled,
    "threads": torch.get_num_threads,
    "anomaly detection": torch.is_anomaly_enabled,
    "multithreaded backward": torch._C._is_multithreading_enabled,
    "random numbers of torch": lambda: torch.get_rng_state().tolist(),
    "random numbers of NumPy": lambda: str(np.random.get_state()),
    "random numbers of Python": random.getstate,
    "hooks on all modules": lambda: [
        list(hooks)
        for name, hooks in vars(nn.modules.module).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    ],
    "functions of torch": lambda: (
        [id(f) for f in (F.relu, torch.relu, Tensor.relu, F.conv2d, F.max_pool2d, F.batch_norm, torch.batch_norm)]
        + [id(f) for f in (F.scaled_dot_product_attention, F.linear, Tensor.detach, nn.Module.__call__)]
    ),
}


def traces(model: nn.Module) -> dict[str, object]:
    """Everything about the process and ``model`` that an explanation could have changed."""
    found: dict[str, object] = {name: read() for name, read in SWITCHES.items()}
    for name, module in model.named_modules():
        kept = {key: list(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[f"module {name}"] = (type(module), module.training, sorted(vars(module)), kept)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        flags = (tensor.requires_grad, tensor._version, tensor._backward_hooks, tensor.grad_fn)
        found[f"tensor {name}"] = (id(tensor), tensor.data_ptr(), tensor.tolist(), *flags, grad)
    return found


def same_traces(before: dict[str, object], after: dict[str, object], *, but: str = "nothing") -> None:
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert [name for name in changed if but not in name] == []


@pytest.mark.parametrize("grads", [False, True], ids=["no gradients yet", "gradients of somebody else"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_left_behind(explainer, training, grads):
    model = seeded(Network).train(training)
    if grads:
        model(images()).sum().backward()
    before = traces(model)
    explainer(model, images(), TARGET).map.square().sum()
    with torch.no_grad():
        explainer(model, images(), TARGET)
    # In training mode a forward pass refreshes the running statistics, explained or not.
    same_traces(before, traces(model), but="tensor norm." if training else "nothing")


class Refusal(RuntimeError):
    """What a broken model raises."""


class RefusesBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise Refusal


def refuse(x: Tensor) -> Tensor:
    raise Refusal


@pytest.mark.parametrize("layer", [refuse, RefusesBackward.apply], ids=["forward", "backward"])
def test_nothing_is_left_behind_by_a_model_that_raises(explainer, layer):
    model = seeded(partial(Network, Layer(layer)))
    before = traces(model)
    for mode in (torch.enable_grad, torch.no_grad):
        try:
            with mode():
                explainer(model, images(), TARGET)
            assert layer is not refuse
        except (Refusal, UserError):
            pass
    same_traces(before, traces(model))


def test_nothing_is_left_behind_by_a_wrong_target(explainer):
    model = seeded(Network)
    before = traces(model)
    with pytest.raises(UserError, match="target"):
        explainer(model, images(), TARGET + 3)
    same_traces(before, traces(model))


def test_nothing_is_left_behind_by_a_refusal(explainer):
    model = seeded(partial(Network, Layer(lambda x: x.cumsum(1).sort(1).values.cumprod(1))))
    before = traces(model)
    try:
        explainer(model, images(), TARGET)
        assert not isinstance(explainer, LRP)
    except UserError:
        assert isinstance(explainer, LRP)
    same_traces(before, traces(model))


def test_a_refusal_breaks_no_other_graph():
    model = seeded(partial(Network, Layer(lambda x: x.cumprod(1))))
    logits = model(images())
    with pytest.raises(UserError, match="rule"):
        LRP(0.05)(model, images(), TARGET)
    logits.sum().backward()


def test_a_refusal_names_the_module():
    model = seeded(Network)
    model.conv2 = nn.Sequential(model.conv2, Layer(lambda x: x.cumprod(1)))
    with pytest.raises(UserError, match=r"conv2\.1"):
        LRP(0.05)(model, images(), TARGET)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_map_is_the_same_constant(explainer, mode):
    model = seeded(Network)
    logits, map = explainer(model, images(), TARGET)
    with mode():
        constant = explainer(model, images(), TARGET)
    assert not constant.logits.requires_grad and not constant.map.requires_grad and constant.map.grad_fn is None
    torch.testing.assert_close(constant.map, map.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(constant.logits, logits.detach(), rtol=1e-12, atol=1e-14)


def test_autocast_around_it_changes_no_bit(explainer):
    model, x = seeded(Network).float(), images().float()
    expected = explainer(model, x, TARGET)
    weights = list(model.parameters())
    slope = torch.autograd.grad(expected.map.square().sum(), weights, materialize_grads=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = explainer(model, x, TARGET)
        assert torch.is_autocast_enabled("cpu")
    assert found.map.dtype == found.logits.dtype == torch.float32
    assert torch.equal(found.map, expected.map) and torch.equal(found.logits, expected.logits)
    for a, b in zip(torch.autograd.grad(found.map.square().sum(), weights, materialize_grads=True), slope):
        assert torch.equal(a, b)


# Company: other threads, other models, a model that explains.


def test_threads_with_other_models_and_explainers_change_no_bit():
    models = [seeded(Network), seeded(partial(Network, nn.ReLU(inplace=True)), 7).train(), seeded(Network, 9).float()]

    def explain(task: tuple[str, int]) -> list[Tensor]:
        name, number = task
        # torch itself lets no two threads train one batch norm: a forward pass moves its statistics in place.
        model = copy.deepcopy(models[number]) if models[number].training else models[number]
        explainer = EXPLAINERS[name]()
        draws = explainer.draw(3, torch.Generator().manual_seed(3)) or None
        map = explainer(model, images(number).to(model.fc.weight.dtype), TARGET, draws=draws).map
        slope = torch.autograd.grad((map - 1).square().sum(), list(model.parameters()), materialize_grads=True)
        return [map.detach(), *slope]

    def attempt(task: tuple[str, int]) -> list[Tensor] | str:
        try:
            return explain(task)
        except UserError as error:  # an explainer may refuse batch norm in training mode, always or never
            return str(error)

    tasks = list(product(EXPLAINERS, range(3)))
    serial = [attempt(task) for task in tasks]
    assert sum(isinstance(found, list) for found in serial) >= 2 * len(EXPLAINERS)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(attempt, tasks + tasks[::-1]))
    for one, other in zip(serial + serial[::-1], parallel, strict=True):
        assert type(one) is type(other)
        pairs = zip(one, other) if isinstance(one, list) else [(one, other)]
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


class Looks(nn.Module):
    """Weighs its input by where another network looks, then classifies."""

    def __init__(self, *, follows: bool) -> None:
        super().__init__()
        self.first, self.second = Plain(), Plain()
        self.follows = follows

    def look(self, x: Tensor) -> Tensor:
        """Input gradient by the library."""
        with torch.set_grad_enabled(self.follows and torch.is_grad_enabled()):
            return InputGradient()(self.first, x, TARGET).map

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x * (1 + self.look(x)))


class LooksByHand(Looks):
    def look(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y = self.first(x).gather(1, TARGET[:, None]).sum()
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return gradient if self.follows else gradient.detach()


def looking(kind, *, follows: bool, inplace: bool = False) -> nn.Module:
    model = seeded(partial(kind, follows=follows))
    model.first.act = nn.ReLU(inplace=inplace)
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("follows", [False, True], ids=["look is a constant", "look is followed"])
def test_a_model_may_explain_inside(follows, inplace):
    by_hand, ours = looking(LooksByHand, follows=follows), looking(Looks, follows=follows, inplace=inplace)
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(x).gather(1, TARGET[:, None]).sum(), x, create_graph=True)
    before = traces(ours)
    map = InputGradient()(ours, images(), TARGET).map
    torch.testing.assert_close(map, expected, rtol=1e-10, atol=1e-12)
    same_traces(before, traces(ours))
    slopes = [
        torch.autograd.grad(m.square().sum(), list(model.parameters()), materialize_grads=True)
        for m, model in ((map, ours), (expected, by_hand))
    ]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_lrp_through_a_look_is_right_or_refused():
    model = looking(Looks, follows=False)
    factor = 1 + InputGradient()(model.first, images(), TARGET).map.detach()
    expected = LRP(0.05)(Wrapped(model.second, lambda n, x: n(x * factor)), images(), TARGET).map
    torch.testing.assert_close(LRP(0.05)(model, images(), TARGET).map, expected, rtol=1e-10, atol=1e-12)
    curved = looking(Looks, follows=True)
    curved.first.act = nn.Softplus()  # with ReLUs alone, the look would not depend on the input
    with pytest.raises(UserError, match="rule"):
        LRP(0.05)(curved, images(), TARGET)


def test_a_model_may_differentiate_by_its_input():
    models = [looking(kind, follows=False) for kind in (LooksByHand, Looks)]
    maps = [InputGradient()(model, images(), TARGET).map for model in models]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-10, atol=1e-12)


# What hides functions from the explainers.


class ReLUByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


@library.custom_op("hansfree_tests::relu", mutates_args=())
def relu_operator(x: Tensor) -> Tensor:
    return x.clamp(min=0)


relu_operator.register_autograd(
    lambda ctx, g: g * (ctx.saved_tensors[0] > 0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Wrapped(nn.Module):
    """A network called in an unusual way."""

    def __init__(self, network: nn.Module, call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.network, x)


def plain(part: str = "", layer=None) -> nn.Module:
    """The network; ``layer`` makes what stands in the place of ``part`` out of it."""
    network = seeded(Plain)
    if part:
        setattr(network, part, layer(getattr(network, part)))
    return network


def unusually(call):
    return lambda: Wrapped(plain(), call)


def elsewhere(network: nn.Module, x: Tensor) -> Tensor:
    def call() -> Tensor:
        with torch.enable_grad():
            return network(x)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


HIDES = {
    "scripted network": lambda: torch.jit.script(plain()),
    "traced network": lambda: torch.jit.trace(plain(), images()),
    "scripted activation": lambda: plain("act", torch.jit.script),
    "scripted batch norm": lambda: plain("norm", torch.jit.script),
    "function of one's own": lambda: plain("act", lambda _: Layer(ReLUByHand.apply)),
    "operator of one's own": lambda: plain("act", lambda _: Layer(relu_operator)),
    "clamp": lambda: plain("act", lambda _: Layer(lambda x: x.clamp(min=0))),
    "maximum": lambda: plain("act", lambda _: Layer(lambda x: torch.maximum(x, torch.zeros_like(x)))),
    "where": lambda: plain("act", lambda _: Layer(lambda x: torch.where(x > 0, x, 0.0))),
    "a mask": lambda: plain("act", lambda _: Layer(lambda x: x * (x > 0))),
    "an operator called by its name": lambda: plain("act", lambda _: Layer(torch.ops.aten.relu)),
    "threshold": lambda: plain("act", lambda _: nn.Threshold(0, 0)),
    "recomputed layers": unusually(partial(checkpoint.checkpoint, use_reentrant=False)),
    "recomputed layers, reentrant": unusually(partial(checkpoint.checkpoint, use_reentrant=True)),
    "a symbolic trace": lambda: torch.fx.symbolic_trace(plain()),
    "weights from outside": unusually(lambda n, x: torch.func.functional_call(n, dict(n.named_parameters()), (x,))),
    "vmap": unusually(lambda n, x: torch.func.vmap(lambda one: n(one[None])[0])(x)),
    "functorch's gradient": unusually(lambda n, x: n(x) + 0 * torch.func.grad(lambda a: n(a).sum())(x).sum()),
    "another thread": unusually(elsewhere),
}

COMPILED = {
    "compiled network": lambda: torch.compile(plain(), backend="eager"),
    "compiled activation": lambda: plain("act", lambda relu: torch.compile(relu, backend="eager")),
    "compiled backward": lambda: torch.compile(plain(), backend="aot_eager"),
}


def map_and_slope(explainer: Explainer, model: nn.Module) -> list[Tensor]:
    map = explainer(model, images(), TARGET).map
    weights = dict(model.named_parameters())
    slope = torch.autograd.grad((map - 0.01).square().sum(), list(weights.values()), materialize_grads=True)
    return [map.detach(), *slope]


def by_autograd(model: nn.Module) -> bool:
    """Whether plain autograd differentiates ``model`` twice."""
    x = images().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(model(x).gather(1, TARGET[:, None]).sum(), x, create_graph=True)
        gradient.square().sum().backward()
    except RuntimeError:
        return False
    model.zero_grad()
    return True


NAMED = ("LRP has no rule for", "statistics", "compiled", "scripted", "torch.func", "checkpoint", "computed again")


def right_or_refused(explainer: Explainer, hidden: nn.Module, *, training: bool = False) -> None:
    """Map and weight gradient equal those of the network that nothing hides, or one sentence says why not.

    Where plain autograd raises, a gradient explainer may raise as well.
    """
    expected = map_and_slope(explainer, plain().train(training))
    try:
        found = map_and_slope(explainer, hidden.train(training))
    except UserError as refusal:
        assert any(part in str(refusal) for part in NAMED), refusal
        return
    except RuntimeError:
        assert not isinstance(explainer, LRP) and not by_autograd(hidden)
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def hidden_cases(hides, explainers):
    return [
        pytest.param(hides[name], explainers[explainer], id=f"{explainer} of {name}")
        for name, explainer in product(hides, explainers)
    ]


LOOKS = {"lrp": LRP(0.05), "gradient": InputGradient(), "gradient-x-input": GradientXInput()}


@pytest.mark.parametrize(("build", "explainer"), hidden_cases(HIDES, LOOKS))
def test_what_hides_functions_is_right_or_refused(build, explainer):
    right_or_refused(explainer, build())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("build", "explainer"), hidden_cases(COMPILED, LOOKS))
def test_what_compiles_functions_is_right_or_refused(build, explainer):
    right_or_refused(explainer, build())


def test_recomputing_what_saves_the_same_tensors_is_right():
    """Convolutions and activations keep what torch's own keep, so recomputing them without the rules works."""
    recompute = partial(checkpoint.checkpoint, use_reentrant=False)

    class Recomputed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.norm(self.conv1(x)))
            return self.fc(recompute(lambda x: self.last(self.conv2(x)), x).mean((2, 3)))

    for explainer in LOOKS.values():
        right_or_refused(explainer, seeded(Recomputed))


# Batch norm in training mode that cannot be seen: a script, an operator by its name.


def native(norm: nn.BatchNorm2d) -> nn.Module:
    def call(x: Tensor) -> Tensor:
        return torch.native_batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.momentum, norm.eps
        )[0]

    layer = Layer(call)
    layer.norm = norm
    return layer


@pytest.mark.parametrize("statistics", ["constant", "running", "differentiated"])
@pytest.mark.parametrize("explainer", [LRP, GradientXInput])
@pytest.mark.parametrize("hide", [torch.jit.script, native], ids=["script", "native operator"])
def test_hidden_batch_statistics_are_right_or_refused(hide, explainer, statistics):
    kind = partial(LRP, 0.05) if explainer is LRP else explainer
    try:
        right_or_refused(kind(statistics=statistics), plain("norm", hide), training=True)
    except UserError as refusal:  # the plain network's own, for LRP through differentiated statistics
        assert explainer is LRP and statistics == "differentiated", refusal


def test_synchronised_batch_norm_is_batch_norm_where_nothing_is_synchronised():
    for training in (False, True):
        hidden = nn.SyncBatchNorm.convert_sync_batchnorm(plain())
        assert isinstance(hidden.norm, nn.SyncBatchNorm)
        for explainer in LOOKS.values():
            right_or_refused(explainer, hidden, training=training)


# functorch around the explainer.


@pytest.mark.parametrize("explainer", LOOKS.values(), ids=LOOKS)
def test_functorch_around_an_explanation_is_right_or_refused(explainer):
    model = plain()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        called = Wrapped(model, lambda n, x: torch.func.functional_call(n, weights, (x,)))
        return (explainer(called, images(), TARGET).map - 0.01).square().sum()

    expected = map_and_slope(explainer, plain())[1:]
    try:
        found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    except UserError:
        return
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
