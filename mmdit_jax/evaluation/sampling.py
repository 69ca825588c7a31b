"""From prompts to pictures: encode, solve the ODE with guidance, decode.

Used by the sample grids of training, by the sample command and by the evaluators. Picture i of a
call depends on (seed, i, prompt i) alone, whatever the batch size or the mesh.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from mmdit_jax import sharding
from mmdit_jax.flow.formulation import Formulation
from mmdit_jax.flow.guidance import guided
from mmdit_jax.flow.named import lookup
from mmdit_jax.flow.solvers import SOLVERS, solve


class SampleSettings(NamedTuple):
    """Everything that decides a picture besides the weights, the prompt and its index.

    Attributes:
        steps: solver steps.
        solver: a name in `flow.solvers.SOLVERS`.
        grid: a name in `flow.solvers.GRIDS`.
        shift: of the sampling grid (a number or a rule); independent of the training shift.
        cfg: guidance scale; 1 is the conditional model.
        cfg_interval: guidance acts for t inside it.
        seed: of the initial noise.
    """

    steps: int = 28
    solver: str = "euler"
    grid: str = "exact"
    shift: float | str = 1.0
    cfg: float = 5.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0


class Drawn(NamedTuple):
    """A batch of samples, on the host.

    Attributes:
        latents: what `Sampler.decode` makes pictures of, on the devices; filled up to a whole
            batch.
        path_length: (N,) float64, sum over the steps of |z_i+1 - z_i| (Table 6).
        displacement: (N,) float64, |z_end - z_start|: the length of a straight path between them.
    """

    latents: jax.Array
    path_length: np.ndarray
    displacement: np.ndarray


class Sampler:
    """Samples pictures from parameters and prompts."""

    def __init__(
        self,
        *,
        predict: Callable[..., jax.Array],
        assemble: Callable[..., Any],
        encode: Callable[[Sequence[str]], Any],
        decode: Callable[[jax.Array], jax.Array],
        formulation: Formulation,
        latent_shape: tuple[int, int, int],
        mesh: Mesh,
        settings: SampleSettings,
        batch_size: int = 64,
    ):
        """Prepares and compiles on first use, once for each size.

        Args:
            predict: (params, z, t, condition) -> output.
            assemble: (text outputs, keep) -> condition; all False is the null condition.
            encode: captions -> text outputs, numpy.
            decode: normalised latents, spread over the mesh -> uint8 pictures (B, H, W, 3), whole
                on every device. Not compiled into the sampler, where the weights of a decoder
                would be constants.
            formulation: of training.
            latent_shape: (H, W, C), where no other size is asked for.
            mesh: the batch is spread over it; the batch size is rounded up to fit.
            settings: of the sampler.
            batch_size: pictures in one call.
        """
        ways = sharding.batch_ways(mesh)
        self._batch_size = -(-batch_size // ways) * ways
        self._encode, self.decode_latents, self._mesh = encode, decode, mesh
        self._size, channels = latent_shape[:2], latent_shape[2]
        lookup(SOLVERS, settings.solver, what="solver")  # refused now, not at the first picture
        self._formulation = formulation
        self._predict, self._assemble, self._channels = predict, assemble, channels
        self._use(settings)

    def with_settings(self, **changes: Any) -> "Sampler":
        """The same with other `SampleSettings`; encoders and decoder are shared."""
        settings = self.settings._replace(**changes)
        if settings == self.settings:
            return self  # with what it has compiled
        other = copy.copy(self)
        other._use(settings)
        return other

    def _use(self, settings: SampleSettings) -> None:
        predict, assemble, formulation = self._predict, self._assemble, self._formulation
        channels, mesh = self._channels, self._mesh
        self.settings = settings
        times = formulation.grid(settings.steps, settings.shift, settings.grid)

        def sample(
            params: Any, text: Mapping[str, Any], index_B: jax.Array, size: tuple[int, int]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(settings.seed), i))(index_B)
            shape = (*size, channels)
            eps = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)

            def velocity(z: jax.Array, t: jax.Array, condition: Any) -> jax.Array:
                return formulation.velocity(predict(params, z, t, condition), z, t)

            velocity_fn = guided(
                velocity,
                assemble(text, None),
                assemble(text, dict.fromkeys(text, False)),
                scale=settings.cfg,
                interval=settings.cfg_interval,
            )
            start = formulation.prior(eps)
            end = solve(velocity_fn, start, times, settings.solver, path=formulation.path)
            displacement = jnp.sqrt(jnp.sum((end.z - start) ** 2, axis=(1, 2, 3)))
            return end.z, end.path_length, displacement

        place, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._sample = jax.jit(sample, out_shardings=(place, whole, whole), static_argnums=3)

    def lower(self, params: Any, text: Mapping[str, Any]) -> jax.stages.Lowered:
        """The solver on one batch, for shapes of the parameters and of the encoded text."""
        index = jax.ShapeDtypeStruct((self._batch_size,), jnp.uint32)
        with jax.set_mesh(self._mesh):
            return self._sample.lower(params, text, index, self._size)

    def __call__(
        self, params: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """uint8 (N, H, W, 3), one picture a prompt; every process must call it.

        `size`: height and width of the latent; None is that of `latent_shape`.
        """
        return np.concatenate([pictures for _, pictures in self.pictures(params, prompts, size)])

    def pictures(
        self, params: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> Iterator[tuple[Sequence[str], np.ndarray]]:
        """The same in parts: prompts and their pictures, so that not all of them are held."""
        for part, drawn in self.drawn(params, prompts, size):
            yield part, self.decode(drawn)

    def decode(self, drawn: Drawn) -> np.ndarray:
        """uint8 (N, H, W, 3) of a batch of samples."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self.decode_latents(drawn.latents))[: len(drawn.path_length)]

    def drawn(
        self, params: Any, prompts: Sequence[str], size: tuple[int, int] | None = None
    ) -> Iterator[tuple[Sequence[str], Drawn]]:
        """Prompts and their samples, a batch at a time; the last one is filled up."""
        place = sharding.batch_sharding(self._mesh)
        for start in range(0, len(prompts), self._batch_size):
            part = list(prompts[start : start + self._batch_size])
            filled = part + [part[-1]] * (self._batch_size - len(part))
            index = np.arange(start, start + len(filled), dtype=np.uint32)
            with jax.set_mesh(self._mesh):
                text = jax.tree.map(lambda x: jax.device_put(x, place), self._encode(filled))
                latents, *lengths = self._sample(params, text, index, size or self._size)
            lengths = (np.asarray(length, np.float64)[: len(part)] for length in lengths)
            yield part, Drawn(latents, *lengths)


def draw_grid(
    pictures: np.ndarray, labels: Sequence[str], *, columns: int = 0, cell: int = 160
) -> Image.Image:
    """A grid with the prompt under each picture.

    Args:
        pictures: uint8 (N, H, W, 3).
        labels: N prompts.
        columns: 0 chooses a grid that is about twice as wide as high.
        cell: least width of a picture in the grid; small ones are enlarged without smoothing.
    """
    columns = columns or min(len(pictures), max(1, math.ceil(math.sqrt(2 * len(pictures)))))
    rows = -(-len(pictures) // columns)
    enlarged = max(1, round(cell / pictures.shape[2]))
    height, width = (side * enlarged for side in pictures.shape[1:3])
    font = ImageFont.load_default(size=12)
    gap, line = 8, 15
    wrapped = [_wrap(label, font, width) for label in labels]
    caption = line * max(len(lines) for lines in wrapped) + 4
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = gap + (i % columns) * (width + gap)
        y = gap + (i // columns) * (height + caption + gap)
        shown = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(shown, (x, y))
        for j, text in enumerate(lines):
            pen.text((x, y + height + 3 + j * line), text, fill="black", font=font)
    return sheet


def _wrap(text: str, font: Any, width: int, most: int = 3) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:most]
