"""How the processes of a run find each other, also those that a launcher has started again."""

import os
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import parse_qs, urlparse

from torch.distributed import DistError, PrefixStore, Store, TCPStore, register_rendezvous_handler

from difftrain_utils.errors import InputError, ProcessError, some

SCHEME = "difftrain"


def init_method(minutes: float) -> str:
    """What `torch.distributed.init_process_group` takes for all processes to come together within so many minutes.

    Raises:
        InputError: processes on several machines would be started again without knowing of each other's start.
    """
    restarts, machines = (int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"))
    if machines > 1 and restarts and uses_agent_store():
        raise InputError(
            f"--max-restarts {restarts} on {machines} machines needs the launcher's options --rdzv-backend c10d and "
            "--rdzv-endpoint, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; or start it without restarts"
        )
    return f"{SCHEME}://?minutes={minutes}"


def uses_agent_store() -> bool:
    """Whether the processes meet at the store of torchelastic's agent, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(url: str, timeout: timedelta, **kwargs) -> Iterator[tuple[Store, int, int]]:
    """As torch's `env://`, and all processes have come when it returns.

    Torch gives the agent's store to each attempt as the last one has left it, in which a process may read the address
    of one that is dead. So the keys of each attempt have their own prefix. On one machine, its number will do; on
    several, each agent counts for itself, and the store has to be new (`init_method` sees to that).

    Raises:
        ProcessError: some have not come in time.
    """
    minutes = float(parse_qs(urlparse(url).query)["minutes"][0])
    rank, world_size, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    limit, port = timedelta(minutes=minutes), int(os.environ["MASTER_PORT"])
    late = f"within {minutes:g} minutes (train.init_minutes)"
    is_master = rank == 0 and not uses_agent_store()
    try:  # without waiting for the others yet, so that it can be said who is missing
        options = {"is_master": is_master, "timeout": limit, "wait_for_workers": False, "multi_tenant": True}
        store = TCPStore(address, port, **options)
    except DistError as error:
        raise ProcessError(f"process {rank} of {world_size} did not reach {address}:{port} {late}") from error
    if uses_agent_store():
        store = PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    names = [f"here/{other}" for other in range(world_size)]
    store.set(names[rank], "")
    try:
        store.wait(names, limit)
    except DistError as error:
        missing = [name.removeprefix("here/") for name in names if not store.check([name])]
        raise ProcessError(f"process {some(missing)} of {world_size} did not come {late}") from error
    yield store, rank, world_size


register_rendezvous_handler(SCHEME, meet)
