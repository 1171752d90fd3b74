"""The image tower of CLIP as a classifier: with a linear head, or zero-shot from the names of the classes.

Radford et al. 2021, https://arxiv.org/abs/2103.00020. Zero-shot: logits = temperature * e / |e| . t_k, where e is
the image's embedding and t_k the text embeddings of class k, each normalised, averaged over the prompt templates
and normalised again. The text tower runs once; temperature and t become one linear layer without bias, and the text
tower is dropped. Explanations hold 1 / |e| (:func:`hansfree.core.held_affine`), so that relevance follows e alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hansfree.config import Schema, parse
from hansfree.core import held_affine
from hansfree.errors import UserError, nearest
from hansfree.models.sources import (
    Built,
    Wanted,
    fetching,
    needs_classes,
    one_line,
    package,
    sound_options,
    three_channels,
)


class ZeroShot(Schema):
    """Classes by name, templates with one pair of braces for the name, and the temperature (None: the model's own)."""

    classes: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)
    temperature: float | None = None


class BorrowedPooling(nn.Module):
    """Another network's last feature map under the attention pooling of a CLIP ResNet."""

    def __init__(self, body: nn.Module, attnpool: nn.Module) -> None:
        super().__init__()
        self.body, self.attnpool = body, attnpool

    def pooled(self, features: Tensor) -> Tensor:
        """An embedding [b, e]. Raises ``UserError`` where the map has another number of pixels than the pooling."""
        pool: Any = self.attnpool
        places, (height, width) = len(pool.positional_embedding) - 1, features.shape[-2:]
        if height * width != places:
            raise UserError(
                f"The teacher's attention pooling reads {places} pixels, but the student's last feature map has "
                f"{height} x {width}; set model.size to what makes them equal, or method.last_layer: copied."
            )
        return pool(features)


class ClipClassifier(nn.Module):
    """head(embedding of the image), the embedding divided by its length where ``normalised``."""

    def __init__(self, visual: nn.Module, head: nn.Linear, *, normalised: bool) -> None:
        super().__init__()
        self.visual, self.head, self.normalised = visual, head, normalised

    def _logits(self, embedding: Tensor) -> Tensor:
        if self.normalised:
            length = embedding.norm(dim=1, keepdim=True).clamp_min(1e-12)
            embedding = held_affine(embedding, 1 / length)
        return self.head(embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [b, classes]."""
        found = self.visual(x)
        return self._logits(found[0] if isinstance(found, tuple) else found)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map [b, c, h, w] of a ResNet; the tokens [b, tokens, width] of a transformer."""
        visual: Any = self.visual
        match type(visual).__name__:
            case "ModifiedResNet":
                return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x)))))
            case "BorrowedPooling":
                return visual.body.forward_features(x)
            case "VisionTransformer":
                return visual.transformer(visual._embeds(x))
            case "TimmModel":
                return visual.trunk.forward_features(x)
            case other:
                raise UserError(f"The image tower {other} shows no feature map; name one of its layers instead.")

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from what :meth:`forward_features` gives."""
        visual: Any = self.visual
        match type(visual).__name__:
            case "ModifiedResNet":
                return self._logits(visual.attnpool(features))
            case "BorrowedPooling":
                return self._logits(visual.pooled(features))
            case "VisionTransformer":
                pooled, _ = visual._pool(features)
                return self._logits(pooled if visual.proj is None else pooled @ visual.proj)
            case _:
                return self._logits(visual.head(visual.trunk.forward_head(features)))

    @property
    def pools_by_attention(self) -> bool:
        """Whether attention pooling stands before the last layer, as in CLIP's own ResNets."""
        return hasattr(self.visual, "attnpool")

    def get_classifier(self) -> nn.Linear:
        """The last linear layer: for a zero-shot classifier temperature times the text embeddings."""
        return self.head


def clip_network(wanted: Wanted) -> Built:
    """open_clip/NAME, NAME one of open_clip's or a folder with an ``open_clip_config.json``.

    Options: ``zero_shot`` (see :class:`ZeroShot`); ``embed_dim``, ``vision_cfg``, ``quick_gelu`` and ``normalised``
    describe an image tower, and are what an exported folder gives in place of open_clip's own description.
    """
    name = f"open_clip/{wanted.name}"
    open_clip = package("open_clip", name, "clip")
    three_channels(wanted, name)
    unknown = set(wanted.options) - {"zero_shot", *_TOWER}
    if unknown:
        raise UserError(f"{name} has no option {min(unknown)!r}; {nearest(min(unknown), ['zero_shot', *_TOWER])}")
    if "vision_cfg" in wanted.options:
        return _described(open_clip, name, wanted)
    local = (Path(wanted.name) / "open_clip_config.json").is_file()
    source = f"local-dir:{wanted.name}" if local else wanted.name
    tower = _tower(open_clip, source, wanted)
    if "zero_shot" in wanted.options:
        return _zero_shot(open_clip, source, wanted, tower, local)
    if wanted.classes is None:
        raise needs_classes(name)
    if not wanted.pretrained and not local:
        return _described(open_clip, name, Wanted(wanted.name, wanted.classes, options={**tower, "normalised": False}))
    visual = _whole(open_clip, source, wanted, tower, local).visual
    head = nn.Linear(tower["embed_dim"], wanted.classes)
    return _built(open_clip, ClipClassifier(visual, head, normalised=False), {**tower, "normalised": False})


_TOWER = ("embed_dim", "vision_cfg", "quick_gelu", "normalised", "bias")


def _tower(open_clip: Any, source: str, wanted: Wanted) -> dict[str, Any]:
    """What describes the image tower; its GELU is the one that the wanted weights were trained with."""
    name = wanted.name
    with fetching(f"open_clip/{name}"):
        config = open_clip.get_model_config(source)
    if config is None:
        raise UserError(f"open_clip has no model {name!r}; {nearest(name, open_clip.list_models())}")
    tag = wanted.pretrained if isinstance(wanted.pretrained, str) else ""
    published = open_clip.get_pretrained_cfg(name, tag) or {}
    vision = {key: value for key, value in config["vision_cfg"].items() if key != "timm_model_pretrained"}
    quick = bool(config.get("quick_gelu") or published.get("quick_gelu"))
    return {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": quick}


def _described(open_clip: Any, name: str, wanted: Wanted) -> Built:
    """An image tower with fresh weights and no text tower, as the options describe it."""
    if wanted.classes is None:
        raise needs_classes(name)
    options = {"quick_gelu": False, "normalised": False, "bias": True, **wanted.options}
    with sound_options(name):
        config = {**options["vision_cfg"], "timm_model_pretrained": False}
        visual = open_clip.model._build_vision_tower(options["embed_dim"], config, options["quick_gelu"])
        head = nn.Linear(options["embed_dim"], wanted.classes, bias=options["bias"])
    return _built(open_clip, ClipClassifier(visual, head, normalised=options["normalised"]), options)


def _built(
    open_clip: Any, network: ClipClassifier, options: Mapping[str, Any], label_names: tuple[str, ...] = ()
) -> Built:
    visual: Any = network.visual
    config = getattr(visual, "preprocess_cfg", {})
    size = visual.image_size
    return Built(
        network,
        network.head.out_features,
        mean=tuple(config.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(config.get("std", open_clip.OPENAI_DATASET_STD)),
        size=(size, size) if isinstance(size, int) else tuple(size),
        options={"bias": network.head.bias is not None, **options},
        label_names=label_names,
    )


def _whole(open_clip: Any, source: str, wanted: Wanted, tower: dict[str, Any], local: bool) -> Any:
    """Both towers with trained weights."""
    name = f"open_clip/{wanted.name}"
    tags = open_clip.list_pretrained_tags_by_model(wanted.name)
    tag = None if local or not isinstance(wanted.pretrained, str) else wanted.pretrained
    if not local and tag not in tags and not (tag and Path(tag).is_file()):
        raise UserError(f"{name} needs the name of its weights, pretrained: TAG; known: {', '.join(tags) or 'none'}.")
    with fetching(name):
        quick = tower["quick_gelu"]
        return open_clip.create_model(source, tag, require_pretrained=True, force_quick_gelu=quick).eval()


def _zero_shot(open_clip: Any, source: str, wanted: Wanted, tower: dict[str, Any], local: bool) -> Built:
    name = f"open_clip/{wanted.name}"
    asked = parse(ZeroShot, wanted.options["zero_shot"], "the zero_shot section")
    _check(asked, wanted, name)
    model = _whole(open_clip, source, wanted, tower, local)
    try:
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # a tokenizer from elsewhere, which raises kinds of its own
        raise UserError(f"The tokenizer of {name} could not be loaded ({one_line(error)}).") from error
    head = folded_text(model, tokenizer, asked)
    options = {**tower, "normalised": True}
    return _built(open_clip, ClipClassifier(model.visual, head, normalised=True), options, asked.classes)


def _check(asked: ZeroShot, wanted: Wanted, name: str) -> None:
    if not asked.classes:
        raise UserError(f"{name} needs the names of its classes in zero_shot; add `classes`.")
    if not asked.templates or any("{}" not in template for template in asked.templates):
        raise UserError("A prompt template needs {} where the name of the class goes, as in 'a photo of a {}.'.")
    if wanted.classes is not None and wanted.classes != len(asked.classes):
        raise UserError(f"{name} has {len(asked.classes)} classes in zero_shot, but {wanted.classes} are wanted.")


@torch.no_grad()
def folded_text(model: Any, tokenizer: Any, asked: ZeroShot) -> nn.Linear:
    """The linear layer that makes zero-shot logits from a normalised image embedding.

    weight[k] = temperature * mean over templates of t / |t|, normalised. A sigmoid-trained model's constant
    (``logit_bias``) is the layer's bias; other models have none.
    """
    rows: list[Tensor] = []
    for label in asked.classes:
        prompts = tokenizer([template.replace("{}", label) for template in asked.templates])
        mean = nn.functional.normalize(model.encode_text(prompts).float(), dim=1).mean(0)
        rows.append(nn.functional.normalize(mean, dim=0))
    scale = model.logit_scale.exp().item() if asked.temperature is None else asked.temperature
    weight, constant = scale * torch.stack(rows), getattr(model, "logit_bias", None)
    head = nn.Linear(weight.shape[1], len(rows), bias=constant is not None)
    head.weight.copy_(weight)
    if constant is not None:
        head.bias.fill_(constant.item())
    return head
