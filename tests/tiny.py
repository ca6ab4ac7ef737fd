"""Small things that several tests need: a tokenizer trained on a few lines."""

import functools

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tritium.runtime.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The END of the story.",
    "Zażółć gęślą jaźń; l'été à la plage, naïve façade, Übergrößenträger.",
    "日本語のテキスト。中文文本、以及标点。한국어 텍스트",
    "Smile 😀😀 wave 👋🏽 family 👨‍👩‍👧‍👦 flag 🇩🇪 keycap 1️⃣",
    "def f(x):\n    return x + 1\n\n\n\tindent\r\n",
]
SPECIAL = ["<|end|>", "<|start|>"]


@functools.cache
def byte_level() -> FastTokenizer:
    """Byte-level BPE with so few merges that most emoji and ideographs are several tokens."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=SPECIAL,
            show_progress=False,
        ),
    )
    fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("wörd", normalized=False)])
    return fast


def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())
