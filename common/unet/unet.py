"""The retrieval-conditioned U-Net: DStack, neighbor attention, UStack (Re-Imagen, section 3.2 and figure 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.diffusion.schedule import LOG_SNR_MAX
from common.unet.collage import Posterior, Preference, cut_out
from common.unet.condition import Condition, KeysValues, Newcomers
from common.unet.config import LAYER_CHANNELS, PLACEMENT_SIZE, UNetConfig
from common.unet.enlargement import Consistency, enlarge
from common.unet.layers import Attention, NoiseEmbedding, ResidualBlock, grid_places
from common.unet.reference import Copy, Laid, Placement, Reference

SELF_SHARPNESS = 8.0
TEXT_SHARPNESS = 4.0
NEIGHBOR_SHARPNESS = 12.0  # sharp enough to begin by reading the same place of the neighbors


class Level(nn.Module):
    """Residual blocks of one grid; each is followed by self-attention and by text attention, where the level has them."""

    def __init__(self, config: UNetConfig, index: int) -> None:
        super().__init__()
        width, count = config.widths[index], config.blocks[index]
        self.residual = nn.ModuleList(ResidualBlock(width, config.embedding_width) for _ in range(count))
        self.self_attention = nn.ModuleList(
            Attention(width, width, config.head_width, positions=config.positions, sharpness=SELF_SHARPNESS)
            for _ in range(count if config.attention[index] else 0)
        )
        self.text_attention = nn.ModuleList(
            Attention(width, config.text_width, config.head_width, positions=False, sharpness=TEXT_SHARPNESS)
            for _ in range(count if config.text_attention[index] else 0)
        )

    def forward(self, x: Tensor, embedding: Tensor, text: list[KeysValues], mask: Tensor) -> Tensor:
        """x [B, C, H, W]; takes from the front of `text` what its text attentions need."""
        for i, block in enumerate(self.residual):
            x = block(x, embedding)
            if self.self_attention:
                attention = self.self_attention[i]
                assert isinstance(attention, Attention)
                x = attention(x, *attention.keys_values(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])), None)
            if self.text_attention:
                x = self.text_attention[i](x, *text.pop(0), mask)
        return x


class DStack(nn.Module):
    """Encodes a picture [B, C_in, H, W] to one feature map a level; x_t and the neighbors share it."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(config, i) for i in range(len(config.widths)))
        self.down = nn.ModuleList(
            nn.Conv2d(a * 4, b, 1) for a, b in zip(config.widths[:-1], config.widths[1:], strict=True)
        )

    def forward(self, x: Tensor, embedding: Tensor, text: list[KeysValues], mask: Tensor) -> list[Tensor]:
        features = []
        for i, level in enumerate(self.levels):
            if i:
                x = self.down[i - 1](F.pixel_unshuffle(x, 2))
            x = level(x, embedding, text, mask)
            features.append(x)
        return features


class UStack(nn.Module):
    """Decodes the feature maps to a map of the finest grid."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.skip_scale = config.skip_scale
        self.levels = nn.ModuleList(Level(config, i) for i in reversed(range(len(config.widths))))
        self.up = nn.ModuleList(
            nn.Conv2d(b, a * 4, 1) for a, b in reversed(list(zip(config.widths[:-1], config.widths[1:], strict=True)))
        )

    def forward(self, features: list[Tensor], embedding: Tensor, text: list[KeysValues], mask: Tensor) -> Tensor:
        x = features[-1]
        for i, level in enumerate(self.levels):
            if i:
                x = F.pixel_shuffle(self.up[i - 1](x), 2) + features[-1 - i]
                x = x if self.skip_scale == 1.0 else self.skip_scale * x
            x = level(x, embedding, text, mask)
        return x


class UNet(nn.Module):
    """A stage's network. `condition` runs once a trajectory, `denoise` at every step."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, patch = config.widths[0], config.patch
        self.embed_noise = NoiseEmbedding(config.embedding_width)
        self.stem = nn.Conv2d(3 * patch * patch, first, 3, padding=1)
        self.dstack = DStack(config)
        self.ustack = UStack(config)
        self.neighbor_attention = nn.ModuleList(
            Attention(w, w, config.head_width, positions=config.positions, sharpness=NEIGHBOR_SHARPNESS)
            for w, attends in zip(config.widths, config.neighbor_attention, strict=True)
            if attends
        )
        self.pool_text = nn.Linear(config.text_width, config.embedding_width) if config.text_width else None
        self.placement = Placement(config.text_width) if config.placement else None
        self.reference = Reference(first, patch) if config.placement else None
        self.copy = Copy(first, patch, config.boldness) if config.placement else None
        self.preference = Preference(config.text_width) if config.placement else None
        self.posterior = Posterior() if config.placement else None
        self.consistency = Consistency() if config.consistent else None
        if config.scale > 1:
            self.low_res_patch = patch if patch % config.scale else patch // config.scale
            self.embed_augmentation = NoiseEmbedding(config.embedding_width)
            self.low_res_stem = nn.Conv2d(3 * self.low_res_patch**2, first, 3, padding=1)
        self.head = nn.Conv2d(first, 3 * patch * patch, 3, padding=1)
        nn.init.normal_(self.head.weight, std=1e-3)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.stem.weight.device

    def condition(
        self,
        *,
        text: Tensor,
        text_mask: Tensor,
        neighbors: Tensor,
        neighbor_text: Tensor,
        neighbor_text_mask: Tensor,
        neighbor_mask: Tensor,
        low_res: Tensor | None = None,
        augmentation: Tensor | None = None,
        group: Tensor | None = None,
        later: bool = False,
    ) -> Condition:
        """Compute what does not change over a trajectory.

        Args:
            text: token states [B, L, text_width]; text_mask [B, L], true where there is a token.
            neighbors: pictures in [-1, 1] [B, K, 3, H, W], K may be 0.
            neighbor_text: their captions' states [B, K, L', text_width]; neighbor_text_mask [B, K, L'].
            neighbor_mask: true where there is a neighbor [B, K].
            low_res: low-resolution picture in [-1, 1], already noised to `augmentation` [B, 3, h, w].
            augmentation: its log-SNR [B].
            group: which neighbor set each row has [B], where fewer sets than rows are given; None: row i has set i.
            later: the neighbors are not encoded here, but by the first pass, which is given them as `newcomers`.
        """
        batch, uses_neighbors = text.shape[0], self.config.uses_neighbors
        encoded: tuple[KeysValues, ...] = ()
        if uses_neighbors and not later and neighbors.shape[1]:
            encoded = self.encode(Newcomers(pictures=neighbors, text=neighbor_text, text_mask=neighbor_text_mask))
        elif uses_neighbors:
            encoded = self._no_keys_values(neighbors)
        offered, layers = self._offered(neighbor_text, neighbor_text_mask), self._layers(neighbors)
        if not uses_neighbors:
            neighbor_mask = neighbor_mask[:, :0]
        if group is not None:
            encoded = tuple((key[group], value[group]) for key, value in encoded)
            offered, layers = offered[group], layers[group]
            neighbor_mask = neighbor_mask[group]
        if (low_res is None) != (self.config.scale == 1) or (augmentation is None) != (self.config.scale == 1):
            raise ValueError("low_res: a super-resolution U-Net needs it with its augmentation; no other takes it")
        return Condition(
            text=self._text(self._text_attentions(), text),
            text_mask=text_mask if self.pool_text is not None else text_mask[:, :0],
            text_embedding=self._pool(text, text_mask),
            placement=self.placement(text, text_mask)
            if self.placement is not None
            else text.new_zeros(batch, PLACEMENT_SIZE),
            neighbors=encoded,
            neighbor_mask=neighbor_mask,
            asked=self._asked(text, text_mask),
            offered=offered,
            pictures=layers,
            low_res=low_res if low_res is not None else text.new_zeros(batch, 3, 0, 0),
            augmentation=augmentation if augmentation is not None else text.new_zeros(batch),
        )

    def denoise(
        self,
        x_t: Tensor,
        log_snr: Tensor,
        condition: Condition,
        *,
        bold: bool = False,
        newcomers: Sequence[tuple[Newcomers, Sequence[int]]] = (),
    ) -> Tensor:
        """The stage's prediction [B, 3, H, W] for x_t [B, 3, H, W] at log-SNR [B].

        Args:
            bold: take pictures over from the neighbors rather than expect a blur, see `Copy`; sampling does, training
                and its losses do not.
            newcomers: sets that are encoded beside x_t, each with the rows of `condition` that read it, which has room
                for them (`later`) and is changed in place.
        """
        embedding = self.embed_noise(log_snr) + condition.text_embedding
        x, enlarged = self.stem(F.pixel_unshuffle(x_t, self.config.patch)), None
        if self.config.scale > 1:
            embedding = embedding + self.embed_augmentation(condition.augmentation)
            enlarged = enlarge(condition.low_res, x_t)
            low_res = condition.low_res if self.low_res_patch < self.config.patch else enlarged
            x = x + self.low_res_stem(F.pixel_unshuffle(low_res.to(x.dtype), self.low_res_patch))
        laid, weights = None, x_t[:, :0]
        if self.reference is not None and condition.neighbor_mask.shape[1]:
            size = (x_t.shape[2], x_t.shape[3])
            laid = self.reference.lay(condition.pictures, condition.neighbor_mask, condition.placement, size)
            weights = self._weights(x_t, log_snr, condition, laid)
            x = x + self.reference(laid, weights)
        features = self._attend_to_neighbors(self._down(x, embedding, condition, newcomers), condition)
        text = list(condition.text[len(self._text_attentions(self.dstack)) :])
        x = self.ustack(features, embedding, text, condition.text_mask)
        drawn = F.pixel_shuffle(self.head(x), self.config.patch)
        if enlarged is not None:
            drawn = enlarged.to(drawn.dtype) + drawn
        if self.consistency is not None:
            drawn = self.consistency(drawn, condition.low_res, condition.augmentation)
        return (
            drawn
            if self.copy is None or laid is None
            else self.copy(drawn, x, laid, weights, log_snr if bold else None)
        )

    def forward(self, x_t: Tensor, log_snr: Tensor, condition: Condition, *, bold: bool = False) -> Tensor:
        """Same as `denoise` without newcomers, so that wrappers which hook `forward` (compilers, data parallel) see it."""
        return self.denoise(x_t, log_snr, condition, bold=bold)

    def _weights(self, x_t: Tensor, log_snr: Tensor, condition: Condition, laid: Laid) -> Tensor:
        """Logarithms of the laid neighbors' weights against one another [B, K, H, W]."""
        assert self.preference is not None and self.posterior is not None
        # Trained by itself to name the neighbor that is nearest: the picture's loss would have it hedge.
        scores = self.preference.score(condition.asked, condition.offered).detach()
        exact = torch.promote_types(x_t.dtype, torch.float32)  # sums over a whole picture
        numbers = (value.to(exact) for value in (x_t, log_snr, laid.pictures, scores))
        return self.posterior(*numbers, laid.mask).to(x_t.dtype)

    def _layers(self, pictures: Tensor) -> Tensor:
        """The neighbors, cut out [B, K, 4, H, W]; none where they are not laid."""
        if self.reference is None or not pictures.shape[1]:
            return pictures.new_zeros(pictures.shape[0], 0, LAYER_CHANNELS, *pictures.shape[3:])
        return cut_out(pictures)

    def _asked(self, text: Tensor, mask: Tensor) -> Tensor:
        return text.new_zeros(text.shape[0], 0) if self.preference is None else self.preference.asked(text, mask)

    def _offered(self, text: Tensor, mask: Tensor) -> Tensor:
        """What the neighbors offer by their captions [B, K, L, text_width]: [B, K, P]."""
        batch, count = text.shape[:2]
        if self.preference is None or not count:
            return text.new_zeros(batch, 0, 0 if self.preference is None else self.preference.width)
        return self.preference.offered(text.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (batch, count))

    def _attend_to_neighbors(self, features: list[Tensor], condition: Condition) -> list[Tensor]:
        attended, layer = list(features), 0
        for i, attends in enumerate(self.config.neighbor_attention):
            if not attends:
                continue
            key, value = condition.neighbors[layer]
            count = condition.neighbor_mask.shape[1]
            per_neighbor = key.shape[2] // count if count else 0
            mask = condition.neighbor_mask.repeat_interleave(per_neighbor, dim=1)
            places = self._places(condition.placement, (features[i].shape[2], features[i].shape[3]))
            attended[i] = self.neighbor_attention[layer](features[i], key, value, mask, places)
            layer += 1
        return attended

    def _places(self, placement: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Where each cell of the grid looks in the neighbors [B, H * W, 2]; None: at its own place."""
        if self.placement is None:
            return None
        zoom, shift = placement[:, None, :2], placement[:, None, 2:4]  # [B, 1, 2] each
        centred = grid_places(*grid, placement.device) - 0.5
        return (1 + zoom) * centred + 0.5 + shift

    def encode(self, newcomers: Newcomers) -> tuple[KeysValues, ...]:
        """What becomes of newcomers, by a pass of the DStack over nothing else."""
        x, embedding, text, mask = self._before_dstack(newcomers)
        return self._keys_values(self.dstack(x, embedding, list(text), mask), newcomers.pictures.shape[0])

    def _before_dstack(self, newcomers: Newcomers) -> tuple[Tensor, Tensor, tuple[KeysValues, ...], Tensor]:
        """What the DStack reads of B sets of K: each picture at t = 0 with its own caption, [B * K, ...]."""
        pictures, text = newcomers.pictures.flatten(0, 1), newcomers.text.flatten(0, 1)
        mask = newcomers.text_mask.flatten(0, 1)
        clean = torch.full((pictures.shape[0],), LOG_SNR_MAX, device=pictures.device)
        return (
            self.stem(F.pixel_unshuffle(pictures, self.config.patch)),
            self.embed_noise(clean) + self._pool(text, mask),
            self._text(self._text_attentions(self.dstack), text),
            mask if self.pool_text is not None else mask[:, :0],
        )

    def _down(
        self, x: Tensor, embedding: Tensor, condition: Condition, newcomers: Sequence[tuple[Newcomers, Sequence[int]]]
    ) -> list[Tensor]:
        """The DStack over rows of pictures, and over the newcomers, whose keys and values come into `condition`."""
        depth = len(self._text_attentions(self.dstack))
        texts, masks = [condition.text[:depth]], [condition.text_mask]
        if newcomers:
            xs, embeddings, their_texts, their_masks = zip(*(self._before_dstack(n) for n, _ in newcomers), strict=True)
            texts, masks = [*texts, *their_texts], [*masks, *their_masks]
            length = max(mask.shape[1] for mask in masks)
            masks = [F.pad(mask, (0, length - mask.shape[1])) for mask in masks]
            pairs = (zip(*layer, strict=True) for layer in zip(*texts, strict=True))
            texts = [[tuple(torch.cat([_longer(t, length) for t in ts]) for ts in pair) for pair in pairs]]
            x, embedding = torch.cat([x, *xs]), torch.cat([embedding, *embeddings])
        features = self.dstack(x, embedding, list(texts[0]), torch.cat(masks))
        first = condition.num_rows
        for each, rows in newcomers:
            last = first + each.num_pictures
            each.encoded = self._keys_values([f[first:last] for f in features], each.pictures.shape[0])
            for whole, new in zip(condition.neighbors, each.encoded, strict=True):
                for of_rows, of_set in zip(whole, new, strict=True):
                    of_rows[list(rows), :, : of_set.shape[2]] = of_set
            first = last
        return [f[: condition.num_rows] for f in features]

    def _keys_values(self, features: Sequence[Tensor], num_sets: int) -> tuple[KeysValues, ...]:
        """Feature maps of N pictures; K of them become one set of tokens a level."""
        attending = [i for i, attends in enumerate(self.config.neighbor_attention) if attends]
        encoded = []
        for i, attention in zip(attending, self.neighbor_attention, strict=True):
            assert isinstance(attention, Attention)
            tokens = features[i].flatten(2).transpose(1, 2).reshape(num_sets, -1, self.config.widths[i])
            encoded.append(attention.keys_values(tokens, (features[i].shape[2], features[i].shape[3])))
        return tuple(encoded)

    def _no_keys_values(self, pictures: Tensor) -> tuple[KeysValues, ...]:
        """Zeros of the shapes that neighbors [B, K, 3, H, W] will have; they take no memory."""
        found = []
        for i, (width, attends) in enumerate(zip(self.config.widths, self.config.neighbor_attention, strict=True)):
            if attends:
                height, columns = (side // (self.config.patch * 2**i) for side in pictures.shape[3:])
                tokens, heads = pictures.shape[1] * height * columns, width // self.config.head_width
                zeros = pictures.new_zeros(1).expand(pictures.shape[0], heads, tokens, self.config.head_width)
                found.append((zeros, zeros))
        return tuple(found)

    def _text_attentions(self, part: nn.Module | None = None) -> list[Attention]:
        """Text attentions in the order in which a pass meets them: the DStack's, then the UStack's."""
        stacks = (self.dstack, self.ustack) if part is None else (part,)
        return [a for stack in stacks for level in stack.levels for a in level.text_attention]  # type: ignore[union-attr]

    @staticmethod
    def _text(attentions: list[Attention], text: Tensor) -> tuple[KeysValues, ...]:
        return tuple(attention.keys_values(text) for attention in attentions)

    def _pool(self, text: Tensor, mask: Tensor) -> Tensor:
        if self.pool_text is None:
            return text.new_zeros(text.shape[0], self.config.embedding_width)
        weights = mask.to(text.dtype)[..., None]
        mean = (text * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        present = mask.any(1)[:, None].to(text.dtype)
        return self.pool_text(mean) * present


def _longer(tokens: Tensor, length: int) -> Tensor:
    """Keys or values [B, heads, N, head_width] with zeros behind them, `length` in all."""
    return F.pad(tokens, (0, 0, 0, length - tokens.shape[2]))
