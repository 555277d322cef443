"""Events: how they are published, and how subscriptions take them.

An event in the queue of a subscription is a job of that subscription. So `rpcq.jobs` runs it, retries it and buries it;
what is here says what a subscription takes, and where its events go.
"""
