"""All checks of one configuration, in the order in which an operator would ask."""

from collections.abc import Iterator

from flowkv.config import ClusterConfig
from flowkv.doctor import model, network, parts, resources
from flowkv.doctor.finding import Finding
from flowkv.doctor.machine import Machine


def examine(config: ClusterConfig, machine: Machine, controller: str | None) -> Iterator[Finding]:
    """One finding after the other, as they are made. `controller` is one to be reached, HOST[:PORT]."""
    is_networked = config.network.listen is not None or controller is not None
    yield parts.versions()
    yield resources.kernel(machine)
    yield resources.run_folder(machine)
    yield network.http(config)
    yield from network.cluster_port(config)
    findings, weights_bytes = model.examine(config)
    yield from findings
    yield resources.cores(config, machine)
    yield resources.instructions(config, machine)
    yield resources.memory(config, machine, weights_bytes)
    yield resources.shared_memory(machine)
    yield resources.locked_memory(config, machine)
    yield resources.huge_pages(machine)
    yield resources.open_files(machine)
    yield resources.processes(config, machine)
    yield parts.gpu(machine)
    yield from parts.nixl(config, machine)
    yield parts.extras()
    yield network.clock(machine.is_clock_synchronised, is_networked)
    if controller is not None:
        yield from network.controller(config, controller)
