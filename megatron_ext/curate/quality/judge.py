"""What a language model makes of one text: the step `quality` and the command `score` decide by it."""
from dataclasses import dataclass

from megatron_ext.curate.quality.config import LanguageModelConfig
from megatron_ext.curate.quality.language_model import NgramModel


@dataclass(frozen=True)
class Judged:
    """Attributes:
        perplexity: per unit of the model.
        unknown: share of units that it never saw.
        word_order: bits a unit; None where it was not looked at.
        reason: "perplexity", "word_order", or None: the text may stay.
    """

    perplexity: float
    unknown: float
    word_order: float | None
    reason: str | None


@dataclass(frozen=True)
class Judge:
    """Limits that the settings leave open are the model's own, from text that it was not fitted on."""

    model: NgramModel
    settings: LanguageModelConfig

    @property
    def max_perplexity(self) -> float:
        given = self.settings.max_perplexity
        return self.settings.slack * self.model.about["held_out"]["perplexity"]["95"] if given is None else given

    def look(self, text: str, *, always: bool = False) -> Judged | None:
        """None for a text below min_characters.

        Args:
            always: word_order of texts too that are not judged by it (NgramModel.order_is_known), to look at.
        """
        if len(text) < self.settings.min_characters:
            return None
        score, order, reason = self.model.score(text), None, None
        if score.perplexity > self.max_perplexity:
            reason = "perplexity"
        given = self.settings.min_word_order
        judged = (
            reason is None and self.settings.word_order and len(text) >= self.settings.order_characters
            and (given is not None or self.model.order_is_known(score))
        )
        if judged or always:
            order = self.model.word_order(text, score)
        if judged and order < (self.model.least_word_order(len(text)) if given is None else given):
            reason = "word_order"
        return Judged(score.perplexity, score.unknown, order, reason)
