"""Settings of this room: `Config.curate.quality`. Every limit of a rule that was published stands in heuristics.py and repetition.py,
beside its source; here is what a project decides for itself. No imports: `config/schema.py` reads this file."""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LanguageModelConfig:
    """Perplexity under an n-gram model that `python -m megatron_ext.curate.quality train` wrote.

    Attributes:
        path: the model's .npz; None leaves this filter out.
        max_perplexity: per unit of the model; above it a document is dropped ("perplexity"). None: `slack` times the model's own 95th
            percentile on text that it was not trained on.
        slack: see there; at least 1. Trusted text of another kind (talk, under a model of statutes) must pass, characters drawn at random
            must not.
        word_order: whether documents whose words stand in no order are dropped ("word_order"): lists of keywords, tables torn apart, text
            that a machine strung together. Only those are judged that are as near the corpus as its own words shuffled are: of another
            kind of text the model cannot tell.
        min_word_order: bits per unit that the order of its words has to be worth (NgramModel.word_order), of every document. None: the
            model's own, which 99 of 100 passages with their words shuffled stay below.
        order_characters: shorter documents are not judged by the order of their words.
        min_characters: shorter documents are not judged: their perplexity says more about chance than about them.
    """

    path: str | None = None
    max_perplexity: float | None = None
    slack: float = 20.0
    word_order: bool = True
    min_word_order: float | None = None
    order_characters: int = 300
    min_characters: int = 100


@dataclass(frozen=True)
class ListsConfig:
    """Word lists (lists.py). A list is a YAML file; the built-in ones are named by their stem.

    Attributes:
        toxic, bias: files, each read for terms and their weights.
        toxic_per_thousand: the weights of a document's terms per 1,000 words, above which it is toxic.
        toxic_least: fewer terms than this never make a document toxic (one quotation in a report does not).
        bias_per_thousand, bias_least: the same for bias.
        toxic_action, bias_action: "drop" ("toxic", "bias"), or "tag": the document stays and its metadata `flags` names it.
    """

    toxic: tuple[str, ...] = ("toxic_ko", "toxic_en")
    bias: tuple[str, ...] = ("bias_ko", "bias_en")
    toxic_per_thousand: float = 10.0
    toxic_least: int = 2
    bias_per_thousand: float = 5.0
    bias_least: int = 2
    toxic_action: str = "drop"
    bias_action: str = "tag"


@dataclass(frozen=True)
class DuplicatesConfig:
    """Exact and near duplicates, of documents and of paragraphs.

    Attributes:
        shingle: "characters" or "words" of the folded text.
        shingle_size: characters or words in a shingle.
        buckets, hashes: MinHash: documents of Jaccard similarity s are taken for duplicates with probability 1 - (1 - s^hashes)^buckets.
        min_paragraph: letters and digits of a paragraph that may be removed as a duplicate; headings and formulas of law are shorter.
        min_characters: letters and digits that must be left of a document once its repeated paragraphs are gone; below, it is dropped
            ("paragraphs_only").
        parts: the second phase of exact and paragraph duplicates is split into this many tasks, each holding 16 bytes a paragraph / parts.
        seed: of the hash functions. Another one is another draw of which pairs just below and above the threshold are found.
    """

    shingle: str = "characters"
    shingle_size: int = 8
    buckets: int = 14
    hashes: int = 8
    min_paragraph: int = 40
    min_characters: int = 50
    parts: int = 8
    seed: int = 1


@dataclass(frozen=True)
class DecontaminateConfig:
    """N-grams of evaluation sets (decontaminate.py).

    Attributes:
        index: the .npz that `python -m megatron_ext.curate.quality index` wrote; None leaves this step without effect.
        action: "drop" ("contaminated"), or "cut": the passages go and the rest stays.
        min_hits: n-grams that must be found before anything is done.
        margin: "cut": characters that go on either side of a passage. GPT-3 (Brown et al. 2020, appendix C) took 200.
        max_pieces: "cut": a document that would fall into more pieces is dropped, as GPT-3 did above 10.
    """

    index: str | None = None
    action: str = "drop"
    min_hits: int = 1
    margin: int = 200
    max_pieces: int = 10


@dataclass(frozen=True)
class QualityConfig:
    """See each part. `clean`: lines of scripts, consent banners and copyright formulas are taken out first (boilerplate.py).
    `heuristics`, `repetition`: whether these rules are applied. `records`: sources (names, or patterns such as "talk-*") whose documents are
    questions, messages or rows: these two, which are made for running text, do not judge them."""

    clean: bool = True
    heuristics: bool = True
    repetition: bool = True
    records: tuple[str, ...] = ()
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    lists: ListsConfig = field(default_factory=ListsConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)


CHOICES = {
    "quality.lists.toxic_action": ("drop", "tag"),
    "quality.lists.bias_action": ("drop", "tag"),
    "quality.duplicates.shingle": ("characters", "words"),
    "quality.decontaminate.action": ("drop", "cut"),
}
RANGES = {
    "quality.language_model.max_perplexity": "(1,inf)",
    "quality.language_model.slack": "[1,inf)",
    "quality.language_model.min_word_order": "(-inf,inf)",
    "quality.language_model.order_characters": "[1,inf)",
    "quality.language_model.min_characters": "[1,inf)",
    **dict.fromkeys(("quality.lists.toxic_per_thousand", "quality.lists.bias_per_thousand"), "[0,inf)"),
    **dict.fromkeys(("quality.lists.toxic_least", "quality.lists.bias_least"), "[1,inf)"),
    "quality.duplicates.shingle_size": "[1,100]",
    "quality.duplicates.buckets": "[1,1000]",
    "quality.duplicates.hashes": "[1,100]",
    "quality.duplicates.min_paragraph": "[1,inf)",
    "quality.duplicates.min_characters": "[0,inf)",
    "quality.duplicates.parts": "[1,4096]",
    "quality.duplicates.seed": "[0,4294967296)",
    "quality.decontaminate.min_hits": "[1,inf)",
    "quality.decontaminate.margin": "[0,inf)",
    "quality.decontaminate.max_pieces": "[1,inf)",
}
