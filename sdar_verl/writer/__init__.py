"""Who writes contexts: the policy, or an endpoint (``sdar.context.writer``)."""
