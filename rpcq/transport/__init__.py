"""What carries messages: RabbitMQ, or an in-process broker that keeps the same rules."""
