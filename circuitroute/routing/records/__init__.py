"""Routing decisions on record, compact in memory and in files: see :class:`RoutingRecord`.

``layers`` has one layer and its two forms, ``sources`` what records are made of, ``record`` the record itself and
``archive`` its files; ``writer`` and ``reader`` are of files of more tokens than memory holds, by ``frames``.
"""

from circuitroute.routing.records.layers import LayerRecord as LayerRecord
from circuitroute.routing.records.reader import RecordFile as RecordFile
from circuitroute.routing.records.record import RoutingRecord as RoutingRecord
from circuitroute.routing.records.record import check_constraint as check_constraint
from circuitroute.routing.records.sources import each_of as each_of
from circuitroute.routing.records.sources import mask_of as mask_of
from circuitroute.routing.records.sources import model_label as model_label
from circuitroute.routing.records.sources import same_temperature as same_temperature
from circuitroute.routing.records.sources import temperatures_of as temperatures_of
from circuitroute.routing.records.writer import RecordWriter as RecordWriter
