"""The audit: layer x defence x attacker; what leaks, what it costs, a verdict.

Names are imported when they are first used, so that the command line starts without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["AttackersConfig", "AuditConfig", "LimitsConfig"],
        "page": ["write_audit"],
        "run": ["Results", "run_audit"],
        "verdict": ["Verdict", "judge"],
    },
)
