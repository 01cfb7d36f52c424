"""VAR: what attention sinks take in image-centric heads goes to the other visual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vtc.calibration.data import Calibration
from vtc.methods.base import Exactness, Method, Site
from vtc.plans import LayerPlan, LayerRule, Redistribution
from vtc.scorers.sinks import first_layer, massive, sink_dims
from vtc.selectors import Count
from vtc.sites import Facts, RowView
from vtc.types import Budget, Tokens


@dataclass(frozen=True, kw_only=True)
class Var(Method):
    """VAR, visual attention redistribution (Kang et al., ICLR 2025, arXiv 2503.03321; official code
    seilk/VisAttnSink, Apache-2.0). Not a compressor: every token stays.

    A token of the prompt is a sink in layer l where φ = max_d |x_d| / sqrt(mean(x²) + 1e-6) of the
    layer's input x, over the language model's sink dimensions d, is above `tau`. In the rows of
    text behind the row's last visual token, later ones included, a head is image-centric where it
    gives visual tokens at least `least` of its attention and visual sinks at most `rho` of that.
    There every sink, of text too, keeps `p` of its weight and the rest is given to the visual
    tokens that are no sinks, in proportion to their weights.

    `rho` and `p` are the official code's: one minus the paper's (author, issue #5). The official
    state is never reset, so that all but the first sample of a process reuse the first one's sinks
    and rows before the image are changed too: here it is per prompt. The last layer is left alone
    in the paper, not in the code. 13B models run with 7B's dimensions there.

    Args:
        tau: τ, 20 in paper and code.
        rho: 0.5 as shipped, for hallucination; the paper's 0.8 for general questions is 0.2 here.
        p: 0.6 as shipped.
        least: 0.2 as shipped.
        dims: the sink dimensions; None: calibrated, or published for known language models.
        calibration: where they are from: a `vtc.Calibration`, its file or the folder that holds it;
            None: published for this model, or the file beside its weights.
        except_last: whether the last layer is left alone.
    """

    name: ClassVar[str] = "var"
    summary: ClassVar[str] = "attention of sinks goes to other visual tokens; none is dropped"
    site: ClassVar[Site] = "llm_rows"
    count: ClassVar[Count] = "adaptive"
    exactness: ClassVar[Exactness] = "restatement"
    published_positions: ClassVar[Literal["keep"]] = "keep"
    bibtex: ClassVar[str] = """@inproceedings{kang2025see,
  title={See What You Are Told: Visual Attention Sink in Large Multimodal Models},
  author={Kang, Seil and others},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    tau: float = 20.0
    rho: float = 0.5
    p: float = 0.6
    least: float = 0.2
    dims: tuple[int, ...] | None = None
    calibration: Calibration | str | None = None
    except_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rho", "p", "least"):
            self.expect(0 <= getattr(self, option) <= 1, "a share in [0, 1]", option)

    @property
    def _composed(self) -> bool:
        return False

    def on(self, facts: Facts) -> Var:
        """With the language model's sink dimensions."""
        if self.dims is not None and not self.dims:
            return self
        dims = sink_dims(self.dims, self.calibration, facts, self.name)
        return replace(self, dims=dims)

    def rule_layers(self, facts: Facts) -> tuple[int, ...]:
        """Those in which sinks may show, if any can."""
        last = facts.llm_depth - int(self.except_last)
        return tuple(range(first_layer(facts.llm_depth), last)) if self.dims else ()

    def plan(self, layers: Tokens, facts: Facts, budget: Budget) -> LayerPlan:
        """Nothing before the prompt is seen."""
        return LayerPlan.stock(facts.llm_depth)

    def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
        """The sinks of this layer's input; nothing is redistributed where none is visual."""
        sinks = (massive(view.hidden, self.dims or ()) > self.tau) & view.mask
        # a row without images is left alone, whatever stands beside it
        rule = replace(rule, sinks=sinks & view.visual.any(-1, keepdim=True))
        if not bool((sinks & view.visual).any()):
            return rule
        return replace(
            rule, redistribution=Redistribution(rho=self.rho, p=self.p, least=self.least)
        )
