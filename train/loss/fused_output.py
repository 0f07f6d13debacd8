"""Computes from the output layer a few logits a row and one logsumexp, without the matrix of tokens x vocabulary.

    hidden states, batch ── FusedOutput, in place of the layer's forward ──> RowLogits ── functional ──> losses

Every loss of this project is a function of the student's logits at ids known beforehand and of the mass of all other
ids. So only one function reads the vocabulary, and its gradient is right for every loss:

    forward     for each chunk of the vocabulary: compute the logits of all rows, gather, add to the running logsumexp
    backward    for each chunk again: the logits, their gradient from the final logsumexp, and its two products

A chunk has all rows and few ids. So the gradient of its part of the weight is complete at once and is rounded to the
weight's dtype only once, and only the inputs are saved from the forward to the backward pass. The cost is a fourth
product with the weight, where gradients computed in the forward pass take three. But those need either whole rows of
logits or a weight gradient that is summed in many rounds; they need the loss in the forward pass (a preference loss is
known only after all sums); and they hold a gradient of the weight's size between the passes.

Legend: B sequences, T positions, R scored rows, H hidden size, V output layer, C ids of a chunk, K kept entries,
J gathered ids a row, N gathered ids of all rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import ModelError
from train.loss.functional import NEGLIGIBLE_LOGIT, RowLogits, accumulation_dtype
from train.model.logit_transform import NO_TRANSFORM, LogitTransform, find_logit_transform

if TYPE_CHECKING:
    # Imported for types only, so that the functions below can be used with torch alone.
    from transformers import PreTrainedModel

    from train.data.collator import Batch

# Entries of a chunk's logits, or of its part of the weight, whichever is larger: 4 MiB in float32 on a CPU, so that its
# caches hold them; 256 MiB elsewhere, because smaller kernels do not fill a GPU. On an H200, 4 MiB chunks take 19 times
# as long as whole logits, 256 MiB ones 1.3 times (docs/benchmarks.md).
_CHUNK_ENTRIES = {"cpu": 2**20}
_CHUNK_ENTRIES_ELSEWHERE = 2**26
# With fewer ids the products are no longer bound by arithmetic.
_MIN_CHUNK_IDS = 256

# Tokens of the comparison with the model's own logits at the start.
_NUM_CHECKED_TOKENS = 8


class FusedOutput:
    """Makes a model's output layer return only the values that the losses need of the scored rows.

    The layer's forward is replaced, not the layer itself, so that the model stays the vanilla class, a tied weight
    stays tied, and ZeRO-3 gathers the weight around the call, forward and backward, as it does for any layer. Outside
    of `scoring` the layer computes logits as before.
    """

    def __init__(self, model: "PreTrainedModel", vocab_size: int) -> None:
        """Replaces the forward, and runs the model on a few tokens where its weights are.

        Args:
            model: a causal language model or one with images, whole, with an attention that runs where its weights are.
            vocab_size: the tokenizer's; the layer's ids from there on are padding.

        Raises:
            ModelError: the model changes its logits in a way that is not supported, or the rows computed here are not
                the model's own.
        """
        self.vocab_size = vocab_size
        self._layer: Any = model.get_output_embeddings()
        self._original_forward = self._layer.forward
        self._transform = find_logit_transform(model)
        # Rows, ids to gather and their mask while `scoring`, and what the layer returned.
        self._scored: tuple[Tensor, Tensor, Tensor] | None = None
        self._gathered: Tensor | None = None
        self._layer.forward = self._forward
        self._check_against(model)

    @contextmanager
    def scoring(self, batch: "Batch", *, kept: bool) -> Iterator[None]:
        """Sets the batch of the model's forward pass within the block, after which `read` has its rows.

        Args:
            kept: True to gather the logits of the teacher's kept entries too.
        """
        with self._scoring(batch.rows, *ids_to_gather(batch, kept=kept)):
            yield

    @contextmanager
    def _scoring(self, rows_R: Tensor, ids_RJ: Tensor, masked_RJ: Tensor) -> Iterator[None]:
        self._scored = rows_R, ids_RJ, masked_RJ
        # Registered now, so that it comes after DeepSpeed's hooks: their outputs gather a weight for the backward pass.
        # The model's own output is not used, because it may have scaled or capped sums of exponentials.
        hook = self._layer.register_forward_hook(self._keep_output)
        try:
            yield
        finally:
            hook.remove()
            self._scored = self._gathered = None

    def _keep_output(self, _layer: Any, _inputs: Any, output: Tensor) -> None:
        self._gathered = output

    def read(self) -> RowLogits:
        """Returns the rows of the forward pass within `scoring`."""
        assert self._scored is not None
        assert self._gathered is not None
        return to_row_logits(self._gathered, self._scored[2])

    def _forward(self, hidden_BTH: Tensor) -> Tensor:
        if self._scored is None:
            logits_BTV: Tensor = self._original_forward(hidden_BTH)
            return logits_BTV
        rows_R, ids_RJ, masked_RJ = self._scored
        hidden_RH = hidden_BTH.flatten(0, 1)[rows_R]
        weight_VH, bias_V = self._layer.weight, getattr(self._layer, "bias", None)
        return gather_logits(
            hidden_RH, weight_VH, bias_V, ids_RJ, masked_RJ, vocab_size=self.vocab_size, transform=self._transform
        )

    def _check_against(self, model: "PreTrainedModel") -> None:
        """Raises ModelError if the rows of a few tokens are not those of the model's own logits."""
        num_tokens = min(_NUM_CHECKED_TOKENS, self.vocab_size)
        ids_T = torch.arange(num_tokens, device=self._layer.weight.device) * (self.vocab_size // num_tokens)
        every_TJ = ids_T.expand(num_tokens, -1)
        with torch.no_grad():
            whole_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :, : self.vocab_size].float()
            with self._scoring(torch.arange(num_tokens), every_TJ, torch.zeros_like(every_TJ, dtype=torch.bool)):
                model(input_ids=ids_T[None], use_cache=False)
                assert self._gathered is not None
                gathered_TJ1 = self._gathered
        expected_TJ1 = torch.cat([whole_TV[:, ids_T], whole_TV.logsumexp(1, keepdim=True)], 1)
        # Rounding of the model's own logits to its dtype.
        allowed = 8 * torch.finfo(model.dtype).eps * max(1.0, float(expected_TJ1.abs().max()))
        difference = float((gathered_TJ1 - expected_TJ1).abs().max())
        if not difference <= allowed:
            raise ModelError(
                f"{type(model).__name__}: the logits computed for training differ by {difference:.3g} from the model's "
                f"own, expected at most {allowed:.3g}; students of this class cannot be trained"
            )


def ids_to_gather(batch: "Batch", *, kept: bool) -> tuple[Tensor, Tensor]:
    """Returns the ids to gather, int64 [R, J], and the mask of those that the logsumexp leaves out, bool [R, J].

    The teacher's kept entries come first and are masked; the scored token is the last and is not.
    """
    own_R1 = batch.targets[:, None]
    if not kept:
        return own_R1, torch.zeros_like(own_R1, dtype=torch.bool)
    assert batch.topk_ids is not None
    assert batch.topk_logprobs is not None
    filled_RK = batch.topk_logprobs > -torch.inf
    return torch.cat([batch.topk_ids, own_R1], 1), torch.nn.functional.pad(filled_RK, (0, 1))


def to_row_logits(gathered_RJ1: Tensor, masked_RJ: Tensor) -> RowLogits:
    """Splits the columns of the result of `gather_logits` for `ids_to_gather`."""
    kept_RK = gathered_RJ1[:, :-2].masked_fill(~masked_RJ[:, :-1], NEGLIGIBLE_LOGIT)
    return RowLogits(kept_RK=kept_RK, own_R=gathered_RJ1[:, -2], rest_lse_R=gathered_RJ1[:, -1])


def gather_logits(  # noqa: PLR0913 - a pure function of its mathematical arguments
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ids_RJ: Tensor,
    masked_RJ: Tensor,
    *,
    vocab_size: int,
    chunk_ids: int | None = None,
    transform: LogitTransform = NO_TRANSFORM,
) -> Tensor:
    """Returns the logits of the given ids of each row, and the logsumexp of the logits of all ids that are not masked.

        z_r = f(W h_r + b);    z_rj for j in ids_r;    log sum_v exp z_rv over v < vocab_size without masked ids of r

    Products are accumulated in float32, or in float64 for float64 input. On a CPU the operands are converted to that
    dtype, chunk by chunk, because without bfloat16 instructions its own products are many times slower. On a GPU they
    stay narrow, and the logits' gradient is narrowed for its two products, because tensor cores take narrow operands.

    Args:
        hidden_RH: [R, H] float.
        weight_VH, bias_V: of the output layer, [V, H] and [V] float; None for a layer without bias.
        ids_RJ: [R, J] int64, below `vocab_size`.
        masked_RJ: [R, J] bool, True for ids that the logsumexp leaves out; these are distinct within a row.
        vocab_size: at most V; ids from here on are padding and take no part.
        chunk_ids: C; by default a number that keeps a chunk at 4 MiB on a CPU and at 256 MiB elsewhere.
        transform: f, what the model does to its logits after the layer.

    Returns:
        [R, J + 1] float32 (float64 for float64 input), the logsumexp in the last column; about -1e30 where all ids are
        masked. Differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError: `vocab_size` exceeds V.
    """
    if vocab_size > len(weight_VH):
        raise ValueError(
            f"the student's output layer has {len(weight_VH)} ids, the tokenizer {vocab_size}: "
            "the student belongs to another tokenizer, or its output layer has to be resized"
        )
    if chunk_ids is None:
        chunk_entries = _CHUNK_ENTRIES.get(hidden_RH.device.type, _CHUNK_ENTRIES_ELSEWHERE)
        chunk_ids = max(chunk_entries // max(1, *hidden_RH.shape), _MIN_CHUNK_IDS)
    gathered_RJ1: Tensor = _GatherLogits.apply(
        hidden_RH, weight_VH, bias_V, ids_RJ, masked_RJ, vocab_size, chunk_ids, transform
    )
    return gathered_RJ1


class _GatherLogits(torch.autograd.Function):
    """The two passes of `gather_logits`.

    `save_for_backward` gets the weight itself, not a view or a copy, because ZeRO-3 partitions it between the passes.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - torch.autograd.Function passes all arguments by position
        ctx: Any,
        hidden_RH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        ids_RJ: Tensor,
        masked_RJ: Tensor,
        vocab_size: int,
        chunk_ids: int,
        transform: LogitTransform,
    ) -> Tensor:
        gathered_N = hidden_RH.new_zeros(ids_RJ.numel(), dtype=accumulation_dtype(hidden_RH))
        lse_R1 = gathered_N.new_full((len(ids_RJ), 1), -torch.inf)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            chunks = _chunks(hidden_RH, weight_VH, bias_V, vocab_size, chunk_ids)
            cells_by_chunk = _cells_by_chunk(ids_RJ, vocab_size, chunk_ids)
            for (_, _, logits_RC), (n, cells) in zip(chunks, cells_by_chunk, strict=True):
                gathered_N[n] = transform.apply_(logits_RC)[cells]
                _mask_logits(logits_RC, cells, masked_RJ.flatten()[n])
                # Written out because on a CPU torch.logsumexp takes longer than the product.
                max_R1 = logits_RC.amax(1, keepdim=True)
                sum_R1 = logits_RC.sub_(max_R1).exp_().sum(1, keepdim=True)
                lse_R1 = torch.logaddexp(lse_R1, max_R1 + sum_R1.log())
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, ids_RJ, masked_RJ, lse_R1)
        ctx.settings = vocab_size, chunk_ids, transform
        return torch.cat([gathered_N.view(ids_RJ.shape), lse_R1], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RJ1: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, bias_V, ids_RJ, masked_RJ, lse_R1 = ctx.saved_tensors
        vocab_size, chunk_ids, transform = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathered_gradient_N, lse_gradient_R1 = gradient_RJ1[:, :-1].flatten(), gradient_RJ1[:, -1:]
        dtype = lse_R1.dtype
        hidden_gradient_RH = torch.zeros_like(hidden_RH, dtype=dtype) if needs_hidden else None
        # The gradient of padding ids stays zero.
        weight_gradient_VH = torch.zeros_like(weight_VH) if needs_weight else None
        bias_gradient_V = torch.zeros_like(bias_V) if needs_bias else None
        with torch.autocast(hidden_RH.device.type, enabled=False):
            operand_RH = hidden_RH.to(_operand_dtype(hidden_RH, weight_VH))
            chunks = _chunks(hidden_RH, weight_VH, bias_V, vocab_size, chunk_ids)
            cells_by_chunk = _cells_by_chunk(ids_RJ, vocab_size, chunk_ids)
            for (start, weight_CH, logits_RC), (n, cells) in zip(chunks, cells_by_chunk, strict=True):
                slope_RC = transform.slope(transform.apply_(logits_RC))
                _mask_logits(logits_RC, cells, masked_RJ.flatten()[n])
                gradient_RC = logits_RC.sub_(lse_R1).exp_().mul_(lse_gradient_R1)
                gradient_RC.index_put_(cells, gathered_gradient_N[n], accumulate=True)
                if not transform.is_identity:
                    gradient_RC.mul_(slope_RC)
                chunk = slice(start, start + len(weight_CH))
                if bias_gradient_V is not None:
                    bias_gradient_V[chunk] = gradient_RC.sum(0)
                gradient_RC = gradient_RC.to(weight_CH.dtype)
                if hidden_gradient_RH is not None:
                    hidden_gradient_RH += _product(gradient_RC, weight_CH, dtype)
                if weight_gradient_VH is not None:
                    weight_gradient_VH[chunk] = _product(gradient_RC.T, operand_RH, dtype)
        if hidden_gradient_RH is not None:
            hidden_gradient_RH = hidden_gradient_RH.to(hidden_RH.dtype)
        return hidden_gradient_RH, weight_gradient_VH, bias_gradient_V, None, None, None, None, None


def _chunks(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, vocab_size: int, chunk_ids: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields of each chunk its first id, weight [C, H] in the operands' dtype, and logits [R, C] for overwriting."""
    dtype, operand = accumulation_dtype(hidden_RH), _operand_dtype(hidden_RH, weight_VH)
    operand_RH = hidden_RH.to(operand)
    for start in range(0, vocab_size, chunk_ids):
        chunk = slice(start, min(start + chunk_ids, vocab_size))
        weight_CH = weight_VH[chunk].to(operand)
        logits_RC = _product(operand_RH, weight_CH.T, dtype)
        yield start, weight_CH, logits_RC if bias_V is None else logits_RC.add_(bias_V[chunk])


def _operand_dtype(hidden_RH: Tensor, weight_VH: Tensor) -> torch.dtype:
    return accumulation_dtype(hidden_RH) if hidden_RH.device.type == "cpu" else weight_VH.dtype


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left @ right if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _cells_by_chunk(ids_RJ: Tensor, vocab_size: int, chunk_ids: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Yields of each chunk the gathered ids within it: their indices among all N, and their rows and columns there.

    The ids are sorted once, so that a pass reads each of them once instead of all in every chunk.
    """
    ids_N = ids_RJ.flatten()
    sorted_N, order_N = ids_N.sort()
    starts = torch.arange(0, vocab_size + chunk_ids, chunk_ids, device=ids_RJ.device)
    counts = torch.searchsorted(sorted_N, starts).diff().tolist()
    for chunk, n in enumerate(order_N.split(counts)):
        yield n, (n // ids_RJ.shape[1], ids_N[n] - chunk * chunk_ids)


def _mask_logits(logits_RC: Tensor, cells: tuple[Tensor, Tensor], masked: Tensor) -> None:
    """Makes the exponentials of masked logits 0, in place."""
    # Added, because a cell may be gathered twice, once masked as a kept id and once unmasked as the scored token.
    logits_RC.index_put_(cells, masked.to(logits_RC.dtype) * NEGLIGIBLE_LOGIT, accumulate=True)
