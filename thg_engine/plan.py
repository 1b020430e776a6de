r"""Sampling plans: a whole run as frozen rows, one per model call.

With registers X_k (past samples), C_k (conditional outputs), D_k (guidance deltas), E_k (guided
outputs) and S_k (a state that a solver keeps besides the sample: the hare's at past coarse points,
or the corrected sample of a predictor-corrector), each newest first, a row does

    delta_hat = c - u                                        if it evaluates both (then D shifts)
              = sum_k w_k D_k + sum_k v_k (c - C_k)          otherwise
    e_hat     = c + g delta_hat                              (then C and E shift)
    state     = sum_k r'_k S_k + sum_k p'_k D_k + sum_k a'_k X_k + sum_k b'_k E_k
                                                             if it has such weights (then S shifts)
    x_next    = sum_k a_k X_k + sum_k b_k E_k + sum_k q_k C_k + sum_k p_k D_k + sum_k r_k S_k + s z

and knows beforehand what it costs. `lowering.py` makes plans, `engine.py` runs them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import InvalidPlan
from .table import PREDICTION_TYPES

FORMAT = "thg-engine-plan"
VERSION = 1
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One model call and the step behind it; every number host float64, dimensionless.

    Attributes:
        timestep: what the denoiser is told.
        lambda_t: half log-SNR at this row, for display and mapping; infinite at zero SNR.
        input_scale: the denoiser is fed ``input_scale * X_0``.
        evaluates_both: whether the unconditional branch runs.
        guidance_weight: g = (w - 1) times the boost of this row.
        delta_weights: w_k, used where the unconditional branch does not run.
        cond_change_weights: v_k for c - C_1, c - C_2, ...
        sample_weights: a_k.
        guided_weights: b_k.
        cond_weights: q_k.
        step_delta_weights: p_k.
        state_weights: r_k, after the state's own update in this row.
        state_update: r'_k, before the update; with all four of these empty: no update.
        state_delta_update: p'_k, after D has shifted.
        state_sample_update: a'_k.
        state_guided_update: b'_k, after E has shifted.
        noise_weight: s.
    """

    timestep: float
    lambda_t: float
    input_scale: float = 1.0
    evaluates_both: bool = True
    guidance_weight: float = 0.0
    delta_weights: Weights = ()
    cond_change_weights: Weights = ()
    sample_weights: Weights = ()
    guided_weights: Weights = ()
    cond_weights: Weights = ()
    step_delta_weights: Weights = ()
    state_weights: Weights = ()
    state_update: Weights = ()
    state_delta_update: Weights = ()
    state_sample_update: Weights = ()
    state_guided_update: Weights = ()
    noise_weight: float = 0.0

    @property
    def updates_state(self) -> bool:
        """Whether S shifts in this row."""
        return any(
            (
                self.state_update,
                self.state_delta_update,
                self.state_sample_update,
                self.state_guided_update,
            )
        )

    @property
    def has_step(self) -> bool:
        """Whether the row says how the next sample is formed."""
        steps = (self.sample_weights, self.guided_weights, self.cond_weights, self.state_weights)
        return any(steps)

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per sample: 2 with both branches, otherwise 1."""
        return 2 if self.evaluates_both else 1


@dataclass(frozen=True)
class SamplingPlan:
    """The rows of one run; checks itself when it is made.

    Attributes:
        rows: one per model call.
        method: guidance method, as reports print it.
        solver: scheduler or closed-form solver of the rows.
        guidance_scale: w that the rows were made for.
        prediction_type: what the denoiser's outputs are.
        initial_scale: x_T is unit Gaussian noise times this.
        notes: choices worth telling the user, one sentence each.

    Raises:
        InvalidPlan: no rows, a number that is not finite, a row that reads a register nobody wrote.
    """

    rows: tuple[Row, ...]
    method: str
    solver: str
    guidance_scale: float
    prediction_type: str = "epsilon"
    initial_scale: float = 1.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))
        if not self.rows:
            raise InvalidPlan("rows", self.rows, "a plan needs at least one row.")
        if self.prediction_type not in PREDICTION_TYPES:
            remedy = f"use one of {', '.join(PREDICTION_TYPES)}."
            raise InvalidPlan("prediction_type", self.prediction_type, remedy)
        for name in ("guidance_scale", "initial_scale"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidPlan(name, getattr(self, name), "give a finite number.")
        _check_rows(self.rows)

    @property
    def num_rows(self) -> int:
        """Model calls of a run."""
        return len(self.rows)

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per sample; a batched pass over both branches counts 2."""
        return sum(row.nfe for row in self.rows)

    @property
    def coarse_grid(self) -> tuple[int, ...]:
        """Rows that evaluate both branches."""
        return tuple(i for i, row in enumerate(self.rows) if row.evaluates_both)

    @property
    def steps_itself(self) -> bool:
        """Whether the rows form the samples too; if not, the pipeline's scheduler does."""
        return all(row.has_step for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return any(row.noise_weight != 0.0 for row in self.rows)

    def register_depths(self) -> dict[str, int]:
        """How many entries of X, C, D, E and S the plan ever reads, the current ones included."""
        depths = dict.fromkeys("XCDES", 0)
        for row in self.rows:
            for register, age in _reads(row):
                depths[register] = max(depths[register], age + 1)
        return depths

    def explain(self) -> str:
        """The plan in words: one line of summary, one per row, then the notes."""
        full = 2 * self.num_rows
        head = f"{self.method} on {self.solver}, w = {self.guidance_scale:g}: "
        head += f"NFE {self.nfe} of {full} ({100 * self.nfe / full:.0f} %), {self.num_rows} steps"
        lines = [head, " row   timestep   lambda  branches       guidance"]
        for i, row in enumerate(self.rows):
            branches = "cond + uncond" if row.evaluates_both else "cond         "
            lines.append(
                f"{i:4d} {row.timestep:10.2f} {row.lambda_t:8.3f}  {branches}  {_guidance(row)}"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> None:
        """Draw which rows evaluate both branches (PNG, PDF or SVG by suffix); makes the folder.

        Raises:
            ImportError: matplotlib is missing (``pip install thg-engine[metrics]``).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.8), layout="constrained")
        axes = figure.subplots()
        for both, label, colour in ((True, "cond + uncond", "C1"), (False, "cond", "C0")):
            rows = [i for i, row in enumerate(self.rows) if row.evaluates_both is both]
            heights = [2 if both else 1] * len(rows)
            axes.bar(rows, heights, width=0.8, color=colour, label=f"{label} ({len(rows)})")
        axes.set(xlabel="row", ylabel="evaluations", yticks=[0, 1, 2])
        axes.locator_params(axis="x", integer=True)
        axes.set_title(f"{self.method} on {self.solver}: NFE {self.nfe} of {2 * self.num_rows}")
        axes.set_ylim(0, 2.8)  # room for the legend
        axes.legend(loc="upper right", ncols=2)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def to_json(self) -> str:
        """The plan as JSON; `from_json` gives an equal plan back, bit for bit."""
        document = {"format": FORMAT, "version": VERSION, "nfe": self.nfe, **asdict(self)}
        for row in document["rows"]:
            if not math.isfinite(row["lambda_t"]):
                row["lambda_t"] = str(row["lambda_t"])
        return json.dumps(document, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SamplingPlan:
        """A plan from `to_json`; `InvalidPlan` if the text is not one or contradicts itself."""
        try:
            document = json.loads(text)
            if document["format"] != FORMAT or document["version"] != VERSION:
                remedy = f"give a {FORMAT} document of version {VERSION}."
                raise InvalidPlan("text", document.get("version"), remedy)
            values = {field.name: document[field.name] for field in fields(cls)}
            values["rows"] = tuple(_row_from_document(row) for row in document["rows"])
            plan = cls(**values)
        except InvalidPlan:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            remedy = f"not a plan document ({error!r})."
            raise InvalidPlan("text", str(text)[:80], remedy) from error
        if plan.nfe != document.get("nfe"):
            raise InvalidPlan("nfe", document.get("nfe"), f"the rows cost {plan.nfe}.")
        return plan


def _row_from_document(document: dict[str, Any]) -> Row:
    """A row from its JSON object."""
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in document.items()
    }
    values["lambda_t"] = float(values["lambda_t"])
    return Row(**values)


def _reads(row: Row) -> Iterator[tuple[str, int]]:
    """(register, age) of every entry the row reads, ages as they stand after the row's shifts."""
    columns = [
        ("X", row.sample_weights),
        ("E", row.guided_weights),
        ("C", row.cond_weights),
        ("D", row.step_delta_weights),
        ("S", row.state_weights),
        ("D", row.state_delta_update),
        ("X", row.state_sample_update),
        ("E", row.state_guided_update),
    ]
    if not row.evaluates_both and row.guidance_weight != 0.0:
        columns.append(("D", row.delta_weights))
        columns.append(("C", (0.0, *row.cond_change_weights)))
    for register, weights in columns:
        yield from ((register, age) for age, weight in enumerate(weights) if weight != 0.0)
    if row.updates_state:
        ages = enumerate(row.state_update)
        # The update reads S before it shifts: age k there is age k + 1 afterwards.
        yield from (("S", age + 1) for age, weight in ages if weight != 0.0)


def _check_rows(rows: tuple[Row, ...]) -> None:
    """Refuse numbers that are not finite and reads of registers that no row has written."""
    written = dict.fromkeys("XCDES", 0)
    for i, row in enumerate(rows):
        for field in fields(row):
            value = getattr(row, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if field.name != "lambda_t" and not all(map(math.isfinite, numbers)):
                raise InvalidPlan(f"rows[{i}].{field.name}", value, "give finite numbers.")
        if math.isnan(row.lambda_t):
            raise InvalidPlan(f"rows[{i}].lambda_t", row.lambda_t, "half log-SNR cannot be NaN.")
        for register in "XCE":
            written[register] += 1
        written["D"] += row.evaluates_both
        written["S"] += row.updates_state
        for register, age in _reads(row):
            if age >= written[register]:
                remedy = (
                    f"row {i} reads {register}_{age}, but only {written[register]} entries of "
                    f"{register} have been written by then; evaluate both branches earlier."
                )
                raise InvalidPlan(f"rows[{i}]", f"{register}_{age}", remedy)


def _guidance(row: Row) -> str:
    """How a row forms its guidance, in a few words."""
    boost = f"g = {row.guidance_weight:g}"
    if row.evaluates_both:
        return f"delta fresh, {boost}"
    if row.guidance_weight == 0.0 or not (row.delta_weights or row.cond_change_weights):
        return "none" if not row.step_delta_weights else "hare carried on by its own solver"
    if row.delta_weights == (1.0,) and not row.cond_change_weights:
        return f"delta held, {boost}"
    terms = [f"{weight:+.3g} D_{k}" for k, weight in enumerate(row.delta_weights)]
    terms += [f"{weight:+.3g} (c - C_{k + 1})" for k, weight in enumerate(row.cond_change_weights)]
    return f"delta = {' '.join(terms)}, {boost}"
