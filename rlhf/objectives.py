"""What policy, critic and reward model minimise or say, as the engine's objectives. Sums only; see megatron_ext/train/objective.py.

Batches come from `experience.Assembler`: `select` are the positions that predict response tokens, `last` the last token of each sequence,
`cu_seqlens` where each response lies among the selected tokens.
"""
import torch
from torch import Tensor

from megatron_ext.config.schema import PpoConfig
from megatron_ext.data.batches import Batch
from megatron_ext.models.decoder import Decoder
from megatron_ext.models.truncated import Kept
from rlhf import kl, policy_losses, preferences
from rlhf.packed import segment_sum


class TokenScore:
    """Logprob and entropy of response tokens under the distribution that they are sampled from.

    Args:
        temperature: of the sampling.
        keep: where the words that top-k and top-p left are remembered, by the batch's `number`; None = they cut nothing. The first scoring of a
            micro-batch reads `words` [response tokens] from it, how many they were.
    """

    names = ()

    def __init__(self, *, temperature: float, keep: dict[tuple[int, int], Kept] | None = None):
        self.temperature, self.keep = temperature, keep

    def needed(self, batch: Batch) -> Tensor | None:
        return batch.fields["select"]

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logprob, entropy), fp32 [response tokens]."""
        kept = None
        if self.keep is not None:
            number = batch.fields["number"]
            if number not in self.keep:
                self.keep[number] = Kept(batch.fields["words"])
            kept = self.keep[number]
        found = model.token_scores(hidden, batch.labels, select=batch.fields["select"], temperature=self.temperature, kept=kept)
        return found.logprob, found.entropy


class Values:
    """What a scalar head says at the positions that predict response tokens: the value of the state before each, fp32 [response tokens]."""

    names = ()

    def needed(self, batch: Batch) -> Tensor:
        return batch.fields["select"]

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        return model.values(hidden, select=batch.fields["select"])


class Rewards:
    """What a scalar head says at the last token of each sequence, fp32 [sequences]."""

    names = ()

    def needed(self, batch: Batch) -> Tensor:
        return batch.fields["last"]

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        return model.values(hidden, select=batch.fields["last"])


class PolicyObjective(TokenScore):
    """The policy loss, an entropy bonus, the KL where it stands in the loss, and the pretraining loss of batches that carry `ptx`.

    Fields of a batch: old_logprob, ref_logprob, advantage, weights [response tokens]; or ptx, a scalar: the factor of its loss.
    """

    names = (*policy_losses.POLICY_SUMS, "policy_loss", "entropy", "weights", "kl_loss", "ptx_loss", "ptx_tokens")

    def __init__(self, settings: PpoConfig, loss: str, *, kl_coef: float, temperature: float, keep: dict[tuple[int, int], Kept] | None = None):
        super().__init__(temperature=temperature, keep=keep)
        self._settings, self._loss, self._kl_coef = settings, policy_losses.POLICY_LOSSES[loss], kl_coef

    def needed(self, batch: Batch) -> Tensor | None:
        return None if "ptx" in batch.fields else super().needed(batch)

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if "ptx" in batch.fields:
            return model.loss(hidden, batch.labels, batch.loss_mask)
        return super().score(model, hidden, batch)

    def loss(self, scores: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        fields, settings = batch.fields, self._settings
        numbers = dict.fromkeys(self.names, torch.zeros((), device=scores[0].device))
        if "ptx" in fields:
            # Gradients are divided by the policy's count; the factor holds it, and the coefficient.
            return scores[0] * fields["ptx"], 0, numbers | {"ptx_loss": scores[0], "ptx_tokens": batch.loss_mask.sum()}
        logprob, entropy = scores
        weights = fields["weights"]
        policy, sums = self._loss(logprob, fields["old_logprob"], fields["advantage"], weights, fields["cu_seqlens"], settings)
        entropies = (weights * entropy).sum()
        total = policy - settings.entropy_coef * entropies
        penalty = torch.zeros_like(entropies)
        if settings.kl_in == "loss":
            penalty = (weights * kl.estimate(logprob, fields["ref_logprob"], settings.kl)).sum()
            total = total + self._kl_coef * penalty
        numbers |= sums | {"policy_loss": policy, "entropy": entropies, "weights": weights.sum(), "kl_loss": penalty}
        return total, int(fields["count"]), numbers


class ValueObjective(Values):
    """The clipped value loss. Fields of a batch: old_values, returns, weights [response tokens], count."""

    names = ("value_clip_fraction", *policy_losses.VARIANCE_SUMS)

    def __init__(self, settings: PpoConfig):
        self._settings = settings

    def loss(self, values: Tensor, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        fields = batch.fields
        total, sums = policy_losses.value_loss(values, fields["old_values"], fields["returns"], self._settings.value_clip, fields["weights"])
        sums |= policy_losses.variance_sums(values, fields["returns"], fields["weights"])
        return self._settings.value_coef * total, int(fields["count"]), sums


class RankingObjective(Rewards):
    """The reward model's loss over all pairs of each prompt. Fields of a batch: prompts int32 [p + 1], where each prompt's responses begin
    among the sequences; ranks int64 [sequences]; margins fp32 [p]."""

    names = preferences.RANKING_SUMS

    def loss(self, rewards: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = batch.fields
        total, sums = preferences.ranking_loss(rewards, fields["prompts"], fields["ranks"], fields["margins"])
        return total, sums["prompts"].to(torch.int), sums


class PreferenceObjective(TokenScore):
    """DPO's loss. Sequences come in pairs, the chosen one first. Fields of a batch: reference fp32 [sequences], the reference's logprob of each."""

    names = (*preferences.DPO_SUMS, "pairs")

    def __init__(self, settings: PpoConfig):
        super().__init__(temperature=1.0)
        self._settings = settings

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        """Logprob of each whole response, fp32 [sequences]."""
        return segment_sum(super().score(model, hidden, batch)[0], batch.fields["cu_seqlens"])

    def loss(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        reference = batch.fields["reference"]
        total, sums = preferences.dpo_loss(
            logprobs[0::2], logprobs[1::2], reference[0::2], reference[1::2], beta=self._settings.beta, label_smoothing=self._settings.label_smoothing,
        )
        pairs = len(logprobs) // 2
        return total, pairs, sums | {"pairs": torch.tensor(float(pairs))}
