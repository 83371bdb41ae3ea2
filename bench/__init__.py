# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: lbapp beside a bare wire, nftables and HAProxy, on one machine, in one run.

Reading order: ``__main__`` (the command) -> ``rounds`` (who is measured when) -> ``targets`` and
``lbapp_targets`` (what stands between clients and servers) -> ``load`` (wrk, iperf3, the prober)
-> ``report`` (table, plot, files). ``lab`` owns namespaces and processes; ``machine`` says what the
machine is and who else uses it. ``scale`` measures size instead of speed.
docs/benchmarks.md explains the numbers.
"""
