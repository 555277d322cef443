"""The transport over RabbitMQ: two sessions, each with a connection of aio-pika."""
