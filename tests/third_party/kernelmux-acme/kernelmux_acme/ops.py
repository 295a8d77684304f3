"""Two ops that core lacks: softcap, and a product that ends in one, as logits of some models do."""

from operator import attrgetter

from kernelmux.graph.formats import Value
from kernelmux.graph.ops import Case, Fused, Part
from kernelmux.graph.ops.cases import ROW_COUNTS, all_weights, elementwise_cases, extreme_cases, marks
from kernelmux.graph.ops.mul_mat import MulMat
from kernelmux.graph.ops.op import Elementwise

CAP = {"cap": 30.0}


class Softcap(Elementwise):
    """y = cap * tanh(x / cap).

    Axes: m rows, n columns.
    Inputs: x [m, n].
    Fields: cap, above 0.
    Outputs: y [m, n]; may be x's memory.
    Numerics: rounded once; never beyond cap.
    """

    name = "softcap"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("cap",)
    in_place = ((0, 0),)
    told = {**Elementwise.told, "cap": attrgetter("cap")}

    def reference(self, node, operands):
        (x,) = operands.inputs
        return (node.cap * (x / node.cap).tanh(),)

    def flops(self, node):
        return 3 * super().flops(node)

    def cases(self):
        yield from elementwise_cases(self, CAP)
        for cap in (0.5, 50.0):
            yield Case(f"softcap-of-{cap}", self.name, (Value("x", (5, 127)),), {"cap": cap}, marks=marks(5))


class MulMatSoftcap(Fused):
    """y = softcap(x Wᵀ).

    Axes: m rows, n outputs, k inputs.
    Inputs: x [m, k]; weight [n, k].
    Fields: cap, above 0.
    Outputs: y [m, n].
    Numerics: as its parts.
    """

    name = "mul_mat_softcap"
    inputs = ("x",)
    outputs = ("y",)
    fields = ("weight", "cap")
    pattern = (Part("mul_mat", ("x",), ("scores",), weight=0), Part("softcap", ("scores",), ("y",)))
    told = {**MulMat.told, "cap": attrgetter("cap")}

    def cases(self):
        for format in all_weights():
            fields = {"weight": (Value("weight", (64, 256), format),), **CAP}
            for m in ROW_COUNTS:
                name = f"mul_mat_softcap-{format}-m{m}"
                yield Case(name, self.name, (Value("x", (m, 256)),), fields, marks=marks(m))
        yield from extreme_cases(self, (3, 256), fields)
