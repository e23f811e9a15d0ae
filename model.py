"""The encoder (XLM-R, InfoXLM, BERT) and its heads, written by hand.

An encoder turns T token ids into T vectors of size C. Each of its L layers does two things:

    attention   every token attends to every other: softmax(Q K^T / sqrt(D)) V, in H heads of size D
    ffn         every token is transformed alone:   C -> F -> C with a GELU in between

After each of the two the result is added to the input and normalized ("post-LN": x = norm(x + f(x)), as in BERT and
RoBERTa). A head on top turns the vectors into logits.

Letters used for shapes in every file of this repository:

    B batch   T tokens   C hidden size   H heads   D = C / H head size   F ffn size   L layers
    V vocabulary

Distillation compares intermediate tensors of two such models. `forward` returns them on request, as *taps*:

    logits, taps = model(ids, mask, capture=("context",))    # taps["context"]: L x (B, H, T, D)

    query, key, value      (B, H, T, D)  Q, K and V of each head, where analyze.py measures errors
    score    (B, H, T, T)  Q K^T / sqrt(D), before softmax; -inf where the key is padding
    map      (B, H, T, T)  softmax of the scores: the attention probabilities
    context  (B, H, T, D)  map @ V of each head, which SDQ distills (arXiv 2307.05972)
    output   (B, T, C)     context after the output projection, before residual and norm
    residual (B, T, C)     output + the attention's input, before the norm
    normed   (B, T, C)     the same after the norm, which the ffn reads (arXiv 2211.11014)
    hidden   (B, T, C)     the embeddings and the output of every layer: L + 1 tensors

Only the requested taps are kept, and PyTorch's fused attention is used unless "score" or "map" is requested or the
attention probabilities are quantized.

NOTE: differs from the originals: there is no dropout on the attention probabilities (it would rule out the fused
kernel on CPU), and padding stands on the right only. BERT is the same encoder with positions from 0 (position_offset)
and a second token type for the second text. Sources: Conneau et al. 2020 (XLM-R), Liu et al. 2019 (RoBERTa), Devlin et
al. 2019 (BERT), Vaswani et al. 2017.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = (
    "query", "key", "value", "score", "map", "context", "output", "residual", "normed", "hidden"
)  # fmt: skip
Taps = dict[str, list[Tensor]]
DISTILLED = {"score", "map", "context"}  # taps inside attention that losses compare


# ---------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class ModelConfig:
    """The shape of an encoder; by default XLM-R base."""

    vocab_size: int = 250002
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_size: int = 3072
    max_tokens: int = 512  # longest sequence, <s> and </s> included
    position_offset: int = 2  # RoBERTa counts positions from pad_id + 1, BERT from 0
    type_vocab_size: int = 1  # XLM-R has one token type for all tokens, BERT one for each text
    pad_id: int = 1
    norm_eps: float = 1e-5
    dropout: float = 0.1
    head: str = "mlm"  # a key of HEADS
    num_labels: int = 0  # classes of the sequence or token head; of the joint head: intents
    num_slots: int = 0  # classes of each token in the joint head
    pooling: str = ""  # of the embedding head: the "mean" of the tokens or the "first"; "": unknown, taken for "mean"
    # The tt.TTConfig of a model whose layers tt.tensorize has replaced: a checkpoint needs to know.
    tt: object | None = None


BERT = ModelConfig(vocab_size=30522, position_offset=0, type_vocab_size=2, pad_id=0, norm_eps=1e-12)  # base, uncased
PRESETS = {
    "mini": ModelConfig(vocab_size=5002, hidden_size=128, num_layers=4, num_heads=4, ffn_size=512, max_tokens=128),
    "xlmr-base": ModelConfig(),
    "xlmr-large": ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096),
    "infoxlm-base": ModelConfig(),  # the same architecture, other weights (Chi et al. 2021)
    "bert-base": BERT,
    "bert-large": replace(BERT, hidden_size=1024, num_layers=24, num_heads=16, ffn_size=4096),
    "minilm": replace(BERT, hidden_size=384, num_layers=6, ffn_size=1536),  # all-MiniLM-L6-v2
    # BERT's shape with XLM-R's tokenizer, 250,002 ids and 35 rows that are not used
    **dict.fromkeys(
        ("multilingual-minilm", "multilingual-e5-small", "paraphrase-multilingual-minilm"),
        replace(BERT, vocab_size=250037, hidden_size=384, ffn_size=1536, pad_id=1),
    ),
}


# ---------------------------------------------------------------------------------------- encoder
class Embeddings(nn.Module):
    """Token + position + type vectors, normalized: (B, T) ids -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.position_offset = config.position_offset
        # A tied MLM head's gradient touches every row, so a sparse one would only add work there.
        self.word = WordEmbedding(config.vocab_size, config.hidden_size, config.head != "mlm")
        self.position = nn.Embedding(config.position_offset + config.max_tokens, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
        first = self.position_offset
        position = self.position(torch.arange(first, first + ids.shape[1], device=ids.device))  # (T, C)
        kind = self.token_type.weight[0] if types is None else self.token_type(types)
        return self.dropout(self.norm(self.word(ids) + position + kind))


class WordEmbedding(nn.Embedding):
    """nn.Embedding whose gradient holds only the rows that the batch used.

    XLM-R's table has 250,002 rows, of which a batch uses a few hundred. A dense gradient would write, clip and update
    192 million parameters to change 0.2 % of them. Here each distinct id is gathered once, and the gradient is a
    sparse tensor of these rows.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, sparse: bool):
        super().__init__(num_embeddings, embedding_dim, sparse=sparse)
        # prepare.py puts a weight quantizer here: rows are quantized after they are gathered.
        self.row_quantizer = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        distinct, where = distinct_ids(ids)  # (U,), (B, T)
        return F.embedding(where, self.rows(distinct))  # (B, T, C)

    def rows(self, ids: Tensor) -> Tensor:
        """The quantized vectors of ids (U): (U, C)."""
        if getattr(self.row_quantizer, "by_number", False):  # pq.py decodes them from its own parameters
            return self.row_quantizer(self.weight, ids)
        return self.row_quantizer(F.embedding(ids, self.weight, sparse=self.sparse))


def distinct_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids, and the place of each of `ids` among them.

    On CUDA there are as many as ids, the last ones repeat the first: to know their number the host would have to wait.
    """
    if not ids.is_cuda:
        return torch.unique(ids, return_inverse=True)
    values, order = ids.flatten().sort()
    place = F.pad(values[1:] != values[:-1], (1, 0)).cumsum(dim=0)
    where = torch.empty_like(place).scatter_(0, order, place)
    return values[:1].repeat(len(values)).scatter_(0, place, values), where.view_as(ids)


class Attention(nn.Module):
    """Multi-head self-attention with residual and norm: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        # Query, key and value read the same tensor: prepare.py puts one activation quantizer here for all three, and
        # those of the two products inside below (Kim et al. 2022).
        self.input_quantizer = nn.Identity()
        self.query_quantizer = nn.Identity()
        self.key_quantizer = nn.Identity()
        self.value_quantizer = nn.Identity()
        self.map_quantizer = nn.Identity()

    def forward(self, x: Tensor, key_mask: Tensor | None, taps: Taps) -> Tensor:
        B, T, C = x.shape
        H, D = self.num_heads, C // self.num_heads
        heads = [t.view(B, T, H, D).transpose(1, 2) for t in self.project(x)]  # (B, H, T, D) each
        for name, t in zip(("query", "key", "value"), heads, strict=True):
            record(taps, name, t)
        if heads[0].dtype == torch.bfloat16 and (not x.is_cuda or DISTILLED & {*taps}):
            # What is distilled needs more digits than bf16 has. On CPU, moreover, the backward of fused attention takes
            # ten times as long in bf16 as in float32.
            with torch.autocast(x.device.type, enabled=False):
                context = self.attend(*(t.float() for t in heads), key_mask, taps)
        else:
            context = self.attend(*heads, key_mask, taps)
        record(taps, "context", context)
        output = self.output(context.transpose(1, 2).reshape(B, T, C).to(x.dtype))
        record(taps, "output", output)
        residual = x + self.dropout(output)
        record(taps, "residual", residual)
        normed = self.norm(residual)
        record(taps, "normed", normed)
        return normed

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, taps: Taps) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V of each head: (B, H, T, D)."""
        q, k, v = self.query_quantizer(q), self.key_quantizer(k), self.value_quantizer(v)
        fused = isinstance(self.map_quantizer, nn.Identity)
        if fused and "score" not in taps and "map" not in taps:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        score = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        if key_mask is not None:
            score = score.masked_fill(~key_mask, float("-inf"))
        attention = score.softmax(dim=-1)
        record(taps, "score", score)
        record(taps, "map", attention)
        return self.map_quantizer(attention) @ v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of every token, (B, T, C) each."""
        inputs = self.input_quantizer(x)
        return self.query(inputs), self.key(inputs), self.value(inputs)


class FeedForward(nn.Module):
    """C -> F -> GELU -> C for every token alone, with residual and norm: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(self.expand(x))))

    def expand(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, F)."""
        # The exact, erf form, as published; the tanh form differs by up to 5e-4.
        return F.gelu(self.up(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, key_mask: Tensor | None, taps: Taps) -> Tensor:
        return self.ffn(self.attention(x, key_mask, taps))


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(
        self, ids: Tensor, mask: Tensor | None, types: Tensor | None, taps: Taps, depth: int | None = None
    ) -> Tensor:
        key_mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T): keys to attend to
        x = self.embeddings(ids, types)
        record(taps, "hidden", x)
        for layer in self.layers[:depth]:
            x = layer(x, key_mask, taps)
            record(taps, "hidden", x)
        return x


def record(taps: Taps, name: str, value: Tensor) -> None:
    if name in taps:
        taps[name].append(value)


# ------------------------------------------------------------------------------------------ heads
class SequenceHead(nn.Module):
    """Logits of each sequence from its first token <s>: (B, T, C) -> (B, num_labels).

    dense -> tanh -> out_proj; BERT calls the first half its pooler.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        first = self.dropout(hidden[:, 0])
        return self.out_proj(self.dropout(torch.tanh(self.dense(first))))


class TokenHead(nn.Module):
    """Logits of each token: (B, T, C) -> (B, T, num_labels)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.dropout(hidden))


class JointHead(nn.Module):
    """Logits of each sequence and of each token: (B, T, C) -> ((B, num_labels), (B, T, num_slots)).

    Two heads of the form dense -> tanh -> out_proj: the intent of a sentence from <s>, and the slot of each word
    (Chen et al. 2019, JointBERT; the second dense as in the code of Yang et al. 2023).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.intent = SequenceHead(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_slots)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.dense(self.dropout(hidden)))
        return self.intent(hidden), self.out_proj(self.dropout(inner))


class MLMHead(nn.Module):
    """Masked language modelling: (B, T, C) -> (B, T, V), with the word embeddings as output matrix
    ("tied").
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word: nn.Module) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word.weight, self.bias)


class PoolerHead(nn.Module):
    """BERT's pretrained pooler: (B, T, C) -> (B, C). with_head makes it the first half of a sequence head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class EmbeddingHead(nn.Module):
    """The vector of a sentence: (B, T, C) -> (B, C), the mean of its tokens or the first one, at length 1.

    Reimers and Gurevych 2019 (Sentence-BERT). The dot product of two such vectors is their cosine.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.takes_first = config.pooling == "first"

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden.float()
        if self.takes_first:
            pooled = hidden[:, 0]
        elif mask is None:
            pooled = hidden.mean(dim=1)
        else:  # filled, not multiplied: padded positions may hold anything
            pooled = hidden.masked_fill(~mask[..., None], 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(pooled, dim=-1)


HEADS = {
    "sequence": SequenceHead,
    "token": TokenHead,
    "joint": JointHead,
    "mlm": MLMHead,
    "embedding": EmbeddingHead,
    "pooler": PoolerHead,
    "none": nn.Identity,  # a bare encoder: its "logits" are the last hidden states (B, T, C)
}


class Model(nn.Module):
    """Encoder and head. `forward` returns logits and the taps named in `capture`."""

    def __init__(self, config: ModelConfig, encoder: Encoder | None = None):
        super().__init__()
        self.config = config
        self.encoder = encoder or Encoder(config)
        self.head = HEADS[config.head](config)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        capture: tuple[str, ...] = (),
        types: Tensor | None = None,
        depth: int | None = None,
    ) -> tuple[Tensor, Taps]:
        """Returns (logits, taps), taps[name] being one tensor per layer (see the top).

        ids: (B, T) token ids, padded on the right.  mask: (B, T) bool, True for real tokens; None if all are. capture:
        names from TAPS. Taps at padded positions are arbitrary: losses mask them. types: (B, T) token types; None if
        all are 0.  depth: run only the lowest layers, for their taps; the logits are None then.
        """
        unknown = set(capture) - set(TAPS)
        if unknown:
            raise ValueError(f"unknown taps {sorted(unknown)}; known: {', '.join(TAPS)}")
        if ids.shape[1] > self.config.max_tokens:
            raise ValueError(f"{ids.shape[1]} tokens, but this model has {self.config.max_tokens} positions")
        taps = {name: [] for name in capture}
        hidden = self.encoder(ids, mask, types, taps, depth)
        if depth is not None:
            return None, taps
        if isinstance(self.head, MLMHead):
            return self.head(hidden, self.encoder.embeddings.word), taps
        if isinstance(self.head, EmbeddingHead):
            return self.head(hidden, mask), taps
        return self.head(hidden), taps


# ---------------------------------------------------------------------------------- making models
def build_model(config: ModelConfig) -> Model:
    """A model with random weights."""
    with torch.device("meta"):  # no storage: PyTorch's own initialization would be thrown away
        model = Model(config)
    return initialize(model)


def initialize(model: Model) -> Model:
    """Give a model on the meta device its storage and BERT's initial weights: normal with std 0.02, biases 0, norms 1,
    the padding vector 0.
    """
    model.to_empty(device="cpu")
    if isinstance(model.head, MLMHead):
        nn.init.zeros_(model.head.bias)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if hasattr(module, "cores"):  # a tensor train (tt.py)
            module.reset_parameters(std=0.02)
    if isinstance(model.encoder.embeddings.word, nn.Embedding):
        with torch.no_grad():
            model.encoder.embeddings.word.weight[model.config.pad_id].zero_()
    return model


def with_head(model: Model, head: str, num_labels: int, num_slots: int = 0) -> Model:
    """The same encoder (shared, not copied) with a new head: where fine-tuning starts.

    A sequence head keeps the dense layer of BERT's pretrained pooler, or of another sequence head. The new head is
    dense: of a model of tensor trains, tensorize it.
    """
    config = replace(model.config, head=head, num_labels=num_labels, num_slots=num_slots)
    new = Model(config, model.encoder)
    for module in new.head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    if model.config.head in ("pooler", "sequence") and head == "sequence" and not model.config.tt:
        new.head.dense.load_state_dict(model.head.dense.state_dict())
    if isinstance(new.encoder.embeddings.word, nn.Embedding):
        new.encoder.embeddings.word.sparse = head != "mlm"
    return new


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


# ------------------------------------------------------------------------------------------ speed
class Dropout(nn.Dropout):
    """nn.Dropout with cheaper random numbers on CPU: PyTorch's own took a third of a training step of tensor trains."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or self.p == 0.0:
            return super().forward(x)
        kept = random_mask(x.shape, 1 - self.p, x.device)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def random_mask(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """A bool tensor, each element True with probability p (to the nearest 1/65536).

    Compares 16 random bits with a threshold. One 64-bit draw serves four elements, which makes this 2-3 times as fast
    on CPU as torch.rand and 8 times as fast as bernoulli_. Quantization noise uses it for every weight at every step
    (quant.py).
    """
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    threshold = min(round(p * 65536) - 32768, 32767)
    return (words.view(torch.int16)[:count] < threshold).view(shape)
