"""The transport over RabbitMQ: two sessions, each with a connection of aio-pika."""

from rpcq import logs

for _name in logs.QUIET:
    logs.silence(_name)
