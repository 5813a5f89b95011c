"""The process of the controller: the shell around `Controller`."""

import logging
import time

import zmq

from flowkv.cluster.controller import Controller
from flowkv.errors import ProtocolError
from flowkv.messages import InstanceExited, Message, Ready
from flowkv.wire import Mailbox, Outbox, SyncContext

_BEAT_MS = 250

_logger = logging.getLogger(__name__)


def run_controller(
    name: str, address: str, launcher_address: str, num_instances: int, epoch: str, backend: str
) -> None:
    """Serve until SystemExit."""
    context = SyncContext()
    outbox = Outbox(context)
    mailbox = Mailbox(context, address)
    controller = Controller(num_instances, epoch, backend)
    outbox.send(launcher_address, Ready(name))
    poller = zmq.Poller()
    poller.register(mailbox.socket, zmq.POLLIN)
    try:
        while True:
            poller.poll(_BEAT_MS)
            for message in mailbox.receive_all():
                _handle(controller, message)
            controller.tick(time.monotonic())
            for to, answer in controller.take_messages():
                outbox.send(to, answer)
            while controller.gone_addresses:
                outbox.drop(controller.gone_addresses.pop())
    finally:
        mailbox.close()
        outbox.close()
        context.term()


def _handle(controller: Controller, message: Message) -> None:
    if isinstance(message, InstanceExited):
        _logger.warning("instance %s is gone: %s", message.instance, message.reason)
    try:
        controller.handle(message, time.monotonic())
    except ProtocolError as error:
        _logger.warning("ignored a message: %s", error)
