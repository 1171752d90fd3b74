"""Small texts in the original layouts, and a tiny model with its tokenizer: what tests of texts read."""

from pathlib import Path

import torch

from hansfree.models.text import load_text_model, save_text_model
from hansfree.torchvision_guard import import_torchvision

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
NEUTRAL = ("film", "plot", "cast", "scene", "score", "ending")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "is", "##ly", ".", *NEUTRAL, *GOOD, *BAD]
WORDS += ["meanwhile", "likewise", "therefore", "thereby", *"0123456789"]
FILES = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")


def write_model(folder: Path, words: list[str] = WORDS, *, seed: int = 0, positions: int = 24, layers: int = 3) -> Path:
    """A BERT of a few thousand weights, with a word-piece tokenizer for ``words``."""
    import_torchvision()  # before transformers, which imports it too
    import tokenizers
    import transformers
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing

    inner = tokenizers.Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    inner.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=positions, **special)
    size = {"hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(
        vocab_size=len(words), max_position_embeddings=positions, initializer_range=0.2, **size
    )
    torch.manual_seed(seed)
    save_text_model(load_text_model(config, num_classes=2), folder)
    wrapped.save_pretrained(folder)
    return folder


def write_film_reviews(folder: Path, count: int = 60) -> Path:
    """Sentences of four domains with ratings, and a lexicon: half of them good, half bad, every fifth strongly."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, name in enumerate(FILES):
        lines = []
        for n in range(count):
            good = n % 2 == 0
            word = (GOOD if good else BAD)[n % 4]
            rating = (1 if good else -1) * (3.0 if n % 5 == 0 else 1.5)
            lines.append(f"{n}\t{rating}\tthe {NEUTRAL[n % 6]} is {word} {' '.join(str(1000 * domain + n))}.")
        lines.append("x\t0.1\tthe plot is a plot")
        lines.append("y\t1.5\t" + lines[0].split("\t")[2].upper())  # a twin of the first
        (folder / f"{name}_GroundTruth.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rated = [f"{word}\t2.0\t0.5\t[2]" for word in GOOD] + [f"{word}\t-2.0\t0.5\t[-2]" for word in BAD]
    (folder / "vader_lexicon.txt").write_text("\n".join([*rated, "ok\t1.0", "ok\t-1.0"]) + "\n", encoding="utf-8")
    return folder


TREES = (
    "(3 (2 The) (4 (3 good) (2 film)))",
    "(4 (2 a) (4 (4 lovely) (2 plot)))",
    "(1 (2 The) (1 (1 poor) (2 cast)))",
    "(0 (0 awful) (2 .))",
    "(2 (2 The) (2 plot))",
    "(3 (3 (2 -LRB-) (3 fine)) (2 -RRB-))",
)


def write_trees(folder: Path) -> Path:
    """Trees as the Stanford Sentiment Treebank lays them out."""
    (folder / "trees").mkdir(parents=True)
    for name in ("train", "dev", "test"):
        (folder / "trees" / f"{name}.txt").write_text("\n".join(TREES) + "\n", encoding="utf-8")
    return folder
