"""The services that `producer_service` calls, and what callers may know of them (`consumer_service.contracts`)."""
