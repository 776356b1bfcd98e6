(global $count (mut i32) #0)
(on request_headers
  (global.set $count #0)
  (if (call $path @/start@) (then (call $say @start@ (call $set_tick_period_milliseconds #50))))
  (if (call $path @/replace@) (then
    (call $say @slow@ (call $set_tick_period_milliseconds #60000))
    (call $say @fast@ (call $set_tick_period_milliseconds #50))))
  #0)
(on tick
  (global.set $count (i32.add (global.get $count) #1))
  (call $num @tick@ (global.get $count))
  (if (i32.eq (global.get $count) #3) (then (call $say @stop@ (call $set_tick_period_milliseconds #0)))))
