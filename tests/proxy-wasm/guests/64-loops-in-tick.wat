(on configure (drop (call $set_tick_period_milliseconds #100)) #1)
(on tick (call $log @tick@) (loop $for_ever (br $for_ever)))
(on request_headers (call $log @alive@) #0)
