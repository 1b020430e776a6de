"""Reads every pipeline class of the installed diffusers and names its pattern of guidance.

``python tests/scan_pipelines.py [NAME...]`` prints a JSON list of class, pattern, denoisers and
reason. Nothing is run: what is read is `__call__` and the methods that it calls.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(importlib.util.find_spec("diffusers").origin).parent
NETS = re.compile(
    r"(image_|text_|unconditional_|super_res_\w+|)(unet|transformer|prior|decoder|model|dit)(_\d)?$"
)
CFG = re.compile(r"classifier_free|cfg|guidance_scale|guidance\b|negative|uncond|guid_active")
SECOND = re.compile(r"uncond|neg|unguided|null")
EXTRA = re.compile(r"skip_layers|skip_guidance|spatio_temporal_guid|modality|self_attention_guid")
THIRD = re.compile(
    r"chunk\([34]\b|_perturbed_attention_guidance|num_cfg \+ 1|do_self_attention_guidance"
    r"|editing_prompts\)|3 if enable_safety"
)
PAIRS = re.compile(
    r"(\w+), (\w+) = (?:\w+(?:\[0\])?\.chunk\(2|(?:torch|np)\.split\(\w+, (?:2|len)"
    r"|\(\w+\[::2\], |\(\w+\[:, 0\], )"
)


@dataclass(frozen=True)
class Call:
    """A call of a denoiser: the component, and the conditions that it stands under."""

    net: str
    node: ast.Call
    tests: tuple[str, ...]
    contexts: tuple[str, ...]
    looped: bool


@dataclass
class Read:
    """What the scan knows of one class."""

    name: str
    source: str = ""
    calls: list[Call] = field(default_factory=list)
    trees: list[ast.FunctionDef] = field(default_factory=list)

    @property
    def nets(self) -> list[str]:
        return sorted({name for call in self.calls for name in call.net.split(",")})

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.source) is not None


@functools.cache
def classes() -> dict[str, ast.ClassDef]:
    """Every class in diffusers' pipelines and modular pipelines, by name."""
    found: dict[str, ast.ClassDef] = {}
    for folder in ("pipelines", "modular_pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, node)
    return found


def lineage(name: str) -> Iterator[ast.ClassDef]:
    """The class and its bases, as far as they are pipelines' own."""
    node = classes().get(name)
    if node is None or name == "DiffusionPipeline":
        return
    yield node
    for base in node.bases:
        yield from lineage(ast.unparse(base).split(".")[-1])


def is_pipeline(name: str) -> bool:
    bases = [ast.unparse(base) for node in lineage(name) for base in node.bases]
    return any(base.split(".")[-1] == "DiffusionPipeline" for base in bases)


def exported() -> list[str]:
    """Names of pipeline classes in diffusers' table of exports, installed extras or not."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    names = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return sorted(name for name in names if isinstance(name, str) and is_pipeline(name))


def methods(name: str) -> dict[str, ast.FunctionDef]:
    found: dict[str, ast.FunctionDef] = {}
    for node in lineage(name):
        for member in node.body:
            if isinstance(member, ast.FunctionDef):
                found.setdefault(member.name, member)
    return found


def of_self(node: ast.AST) -> str | None:
    """``name`` of an expression ``self.name``."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
        return node.attr
    return None


def aliases(function: ast.FunctionDef) -> dict[str, str]:
    """Local names that stand for denoisers of the pipeline."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            arms = [node.value]
            if isinstance(node.value, ast.IfExp):
                arms = [node.value.body, node.value.orelse]
            for net in filter(None, map(of_self, arms)):
                if NETS.match(net):
                    found.setdefault(node.targets[0].id, set()).add(net)
    return {name: ",".join(sorted(nets)) for name, nets in found.items()}


class Finder(ast.NodeVisitor):
    """Collects calls of denoisers and of the pipeline's own methods in one function."""

    def __init__(self, function: ast.FunctionDef, looped: bool) -> None:
        self.names = aliases(function)
        self.calls: list[Call] = []
        self.own: list[tuple[str, bool]] = []
        self.tests: list[str] = []
        self.contexts: list[str] = []
        self.loops = int(looped)
        for node in function.body:
            self.visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        test = ast.unparse(node.test)
        for told, body in ((test, node.body), (f"not ({test})", node.orelse)):
            self.tests.append(told)
            for child in body:
                self.visit(child)
            self.tests.pop()

    def visit_For(self, node: ast.For | ast.While) -> None:
        self.loops += 1
        self.generic_visit(node)
        self.loops -= 1

    def visit_While(self, node: ast.While) -> None:
        self.visit_For(node)

    def visit_With(self, node: ast.With) -> None:
        told = [ast.unparse(item.context_expr) for item in node.items]
        self.contexts += told
        self.generic_visit(node)
        del self.contexts[len(self.contexts) - len(told) :]

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "forward":
            called = called.value
        name = of_self(called) or (called.id if isinstance(called, ast.Name) else "")
        net = self.names.get(name) if isinstance(called, ast.Name) else name
        if net and all(NETS.match(part) for part in net.split(",")):
            state = (tuple(self.tests), tuple(self.contexts), self.loops > 0)
            self.calls.append(Call(net, node, *state))
        elif of_self(called):
            self.own.append((name, self.loops > 0))


def read(name: str) -> Read:
    """`__call__` and all that it reaches in the class."""
    found, defined = Read(name), methods(name)
    todo, seen = [("__call__", False)], set()
    while todo:
        method, looped = todo.pop(0)
        if method in seen or method not in defined:
            continue
        seen.add(method)
        tree = defined[method]
        finder = Finder(tree, looped)
        found.calls += finder.calls
        found.trees.append(tree)
        body = tree.body[1:] if ast.get_docstring(tree) else tree.body
        found.source += "\n".join(map(ast.unparse, body)) + "\n"
        todo += finder.own
    found.calls = [call for call in found.calls if call.looped] or found.calls
    return found


def order(found: Read) -> str | None:
    """The pattern that the names of a split output tell, if any do."""
    for first, second in PAIRS.findall(found.source):
        if "image_embeds" in first or "mask" in first:
            continue
        if SECOND.search(first):
            return "concat"
        if SECOND.search(second):
            return "concat-cond-first"
    return None


def guarded(call: Call) -> bool:
    told = call.tests[-1] if call.tests else ""
    return bool(CFG.search(told)) and not told.startswith("not (")


def second_call(found: Read) -> Call | None:
    """The call that only guidance makes, beside one that is always made."""
    for call in found.calls:
        if any(EXTRA.search(test) for test in call.tests):
            continue
        others = [c for c in found.calls if c is not call and c.tests == call.tests[:-1]]
        if guarded(call) and others:
            return call
        if call.net.startswith("unconditional_") and len(found.nets) > 1:
            return call
    return None


def takes_scale(found: Read) -> bool:
    """Whether the call has an argument for guidance, or the network is told of it."""
    arguments = found.trees[0].args if found.trees else None
    named = [a.arg for a in arguments.args + arguments.kwonlyargs] if arguments else []
    fed = [k for call in found.calls for k in call.node.keywords if k.arg == "guidance"]
    told = any(ast.unparse(k.value) != "None" for k in fed)
    return told or any(re.search(r"guidance_scale$|cfg_scale$", name) for name in named)


def without_calls(found: Read) -> tuple[str, str]:
    if not found.source:
        return "none", "it has no __call__"
    inner = sorted(set(re.findall(r"self\.(\w*(?:pipe|pipeline))\(", found.source)))
    if inner:
        return "none", f"it runs other pipelines: {', '.join(inner)}"
    return "none", "it calls no denoiser"


def judge(found: Read) -> tuple[str, str]:
    """Pattern of guidance, and the reason."""
    if found.has(r"\bguider\.prepare_inputs|\bguider\("):
        return "guider", "a guider makes the batches"
    if not found.calls:
        return without_calls(found)
    if found.has(THIRD.pattern):
        return "three-way", "more than two branches, always or as an option"
    second, split = second_call(found), order(found)
    if second is not None:
        held = any("cache_context" in told for told in second.contexts)
        return "two-calls", f"a second call, {'in' if held else 'without'} a cache context"
    if found.has(r"model_out_list\["):
        return "lists", "lists of samples, the negatives after the rest"
    if split is not None:
        return split, aside(found)
    alike = [sum(c.tests == call.tests for c in found.calls) for call in found.calls]
    if max(alike) > 2 and takes_scale(found):
        return "three-way", "three or more calls of one denoiser"
    if takes_scale(found):
        return "distilled", "the scale is embedded or ignored; no second branch"
    if CFG.search(" ".join(test for call in found.calls for test in call.tests)):
        return "unknown", "calls depend on guidance in a form that is not known"
    return "none", "one branch and no scale"


def aside(found: Read) -> str:
    """What is unusual about one call of two halves."""
    if any(EXTRA.search(test) for call in found.calls for test in call.tests):
        return "two halves of one call; a further call for perturbed guidance as an option"
    if found.has(r"repeat_interleave\(2, dim=0\) if do_classifier"):
        return "two halves of one call, interleaved"
    if found.has(r"\] \* 2, dim=1\)"):
        return "two halves of one call, along dimension 1"
    calls = [call for call in found.calls if not call.tests and call.net == found.nets[0]]
    if len(calls) > 1:
        return "two halves of one call; several such calls in a step"
    return "two halves of one call"


def entry(name: str) -> dict:
    found = read(name)
    pattern, reason = judge(found)
    return {"class": name, "pattern": pattern, "denoisers": found.nets, "reason": reason}


def leaves(block) -> Iterator[type]:
    """Classes of the blocks that a modular pipeline is made of."""
    inner = getattr(block, "sub_blocks", None) or {}
    for child in inner.values():
        yield from leaves(child)
    if not inner or hasattr(block, "loop_expected_components"):
        yield type(block)


def modular() -> list[dict]:
    """Entries of the modular pipelines, by the source of their default blocks."""
    import diffusers

    found = []
    for name in sorted(n for n in dir(diffusers) if n.endswith("ModularPipeline")):
        blocks = getattr(getattr(diffusers, name), "default_blocks_name", None)
        if blocks is not None:
            found.append(modular_entry(name, getattr(diffusers, blocks)()))
    return found


def identifiers(leaf: type) -> set[str]:
    """Names in the code of a block, texts left out; components as ``components.name``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(leaf)))
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_components = ast.unparse(node.value) == "components"
            found.add(f"components.{node.attr}" if of_components else node.attr)
    return found


def calls_net(leaf: type) -> bool:
    """Whether a block calls a denoiser, by its component or a local or state's name for it."""
    called = re.findall(r"(?:components\.|block_state\.|\b)(\w+)\(\n", inspect.getsource(leaf))
    named = {name.removeprefix("current_").replace("denoiser", "model") for name in called}
    return any(NETS.match(name) for name in named)


def modular_entry(name: str, blocks) -> dict:
    every = {leaf: identifiers(leaf) for leaf in set(leaves(blocks))}
    loops = {leaf: names for leaf, names in every.items() if calls_net(leaf)}
    used = set().union(*loops.values()) if loops else set()
    shown = set().union(*every.values())
    parts = [n.removeprefix("components.") for n in used if n.startswith("components.")]
    nets = sorted(n for n in parts if NETS.match(n))
    if not nets:  # a block before the network's picks it
        parts = [n.removeprefix("components.") for n in shown if n.startswith("components.")]
        nets = sorted(n for n in parts if NETS.match(n))
    given = {"class": name, "denoisers": nets}
    if "components.guider" in used:
        return {**given, "pattern": "guider", "reason": "a guider makes the batches"}
    if not loops:
        return {**given, "pattern": "unknown", "reason": "no block calls a denoiser by name"}
    if any(re.match(r"uncond|neg(ative)?_", n) for n in used):
        return {**given, "pattern": "two-calls", "reason": "a second call, without a guider"}
    return {**given, "pattern": "distilled", "reason": "no guider and no second branch"}


def scan() -> list[dict]:
    """Entries of every pipeline class, exported ones first, then the modular ones."""
    return [entry(name) for name in exported()] + modular()


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    told = [one for one in scan() if not wanted or one["class"] in wanted]
    print(json.dumps(told, indent=1))
