# SPDX-FileCopyrightText: The lbapp authors
# SPDX-License-Identifier: Apache-2.0
"""Mininet topologies, the sites that belong to them, and the laboratory that brings them to life.

``single``, ``two_networks`` and ``two_switches`` hold one Topo class each and can be given to
``mn --custom``; the YAML file beside each is its site, in the form that ``lbapp apply -f`` takes.
``lab`` runs a topology with switch, servers and controller; demo, shell, tests and benchmark use it.
"""
