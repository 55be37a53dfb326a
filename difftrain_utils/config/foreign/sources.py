"""Other trainers by name, and what their flags and fields are called here, or why there is none: `difftrain migrate`
translates by these tables, and a foreign flag on the command line is answered from them."""

from typing import Any, NamedTuple

from difftrain_utils.config.foreign.diffusers import DIFFUSERS, DIFFUSERS_DEFAULTS, DIFFUSERS_NOTES
from difftrain_utils.config.foreign.kohya import KOHYA, KOHYA_DEFAULTS, KOHYA_NOTES
from difftrain_utils.config.foreign.mvp import MVP, mvp_batch
from difftrain_utils.config.foreign.simpletuner import SIMPLETUNER
from difftrain_utils.config.foreign.values import Table, batch_size


class Source(NamedTuple):
    """Another trainer: how it is called, its table, the defaults of its scripts by name (one with a dot is a field of
    ours, of what a script always does), and what else is otherwise in a script."""

    title: str
    table: Table
    defaults: dict[str, dict[str, Any]]
    notes: dict[str, str]

    def script_of(self, fields: dict[str, Any]) -> str:
        """The script that a file of these fields is for, as far as its defaults depend on it."""
        if "" in self.defaults:
            return ""
        if "t5xxl" in fields:
            return "flux_train_network"
        return "train_network" if "network_module" in fields else "fine_tune"


SOURCES = {
    "diffusers": Source("diffusers'", DIFFUSERS, DIFFUSERS_DEFAULTS, DIFFUSERS_NOTES),
    "kohya": Source("kohya's", KOHYA, KOHYA_DEFAULTS, KOHYA_NOTES),
    "simpletuner": Source("SimpleTuner's", SIMPLETUNER, {"": {"gradient_accumulation_steps": 1}}, {}),
    "mvp": Source("the MVP's", MVP, {"": {}}, {}),
}


def hint(name: str) -> str | None:
    """What to say of a field that there is not, if another trainer has one of this name: the first that has."""
    for source, (title, table, *_) in SOURCES.items():
        dashes = "" if "." in name else "--"
        if (entry := table.get(name)) is None:
            continue
        if isinstance(entry, str):
            return f"{title} {dashes}{name} has none here: {entry}"
        factor = ", times accumulation steps and processes" if entry.convert in (batch_size, mvp_batch) else ""
        return (
            f"{title} {dashes}{name} is {entry.field} here{factor} (difftrain migrate --from {source} translates all)"
        )
    return None
