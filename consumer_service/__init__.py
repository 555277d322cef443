"""The services that `producer_service` calls, and their contracts (`consumer_service.contracts`)."""
