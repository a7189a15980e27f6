"""The vocabulary of the placebo ``random_text``: everyday English words that say nothing about any task."""

from __future__ import annotations

_WORDS = """
a about above across after again against air all almost along also always among amount an and animal another any are
area around as ask at away back be because become before begin behind below between beyond bird both branch bridge
bright bring broad brother build but by call came can carry cause centre certain change child circle city class clear
climb cloud coast cold colour come common could count country course cover cross crowd current dance dark day deep did
different direct distance do does door doubt down draw dream dry during each ear early earth east edge eight either
else end enough even evening ever every eye face fact fair fall family far farm fast father feel few field fifth
figure final fine first fish five flat flow follow for forest form forward four free fresh friend from full garden
gave general gentle give glad gold good grass great green ground group grow had half hand happy hard has have he hear
heart heavy her here high hill him his history hold hope horse hour how however hundred ice idea if in inside is
island it its join journey joy judge just keep kind king knew know lake land language large last late laugh law lead
leaf learn less letter level lift light like line listen little long low made main make many map mark market matter
may me mean measure middle might mile mind minute moment month moon more morning most mother mountain move much music
must my name narrow near never new next night nine no none north not note now number ocean of off often oil old on
once one only or order other our out over own page paint pair paper part pass past path pattern people perhaps picture
piece plain plan plant play point poor quarter question quick quiet quite rain reach ready real reason red rest rich
right ring river road rock room round row rule run said sail same sand saw say sea season seat second seed seem sense
sent set seven several shade shape share she ship shore short should show side silver simple since sing sister six
size sky sleep slow small smile snow so soft some song soon sound south space speak spring stand star stay step still
stone story strange stream street strong summer sun sure surface swim system tail talk tall teach tell ten test than
that the their them then there these they thin thing third this those though thought thousand three through time to
together told tomorrow too top touch toward town train travel tree trouble true turn twelve twenty two under until up
upon us usual valley verb very view village visit voice wait walk wall war warm watch water wave way we weather week
weight well west what wheel when where which while white who whole whose why wide wild will wind winter wish with
without woman wonder wood word work world would write year yellow yes yet you young your
"""

WORDS: tuple[str, ...] = tuple(_WORDS.split())
