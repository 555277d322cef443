"""Web apps that call the example services."""
