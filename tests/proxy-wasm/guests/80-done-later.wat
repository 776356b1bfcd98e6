(on configure (drop (call $set_tick_period_milliseconds #100)) #1)
(global $ending (mut i32) #0)
(on request_headers (call $say @done@ (call $done)) #0)
(on done
  (if (i32.eq (local.get $id) #1) (then (global.set $ending #1) (call $log @root done@) (return #0)))
  #1)
(on tick
  (if (global.get $ending) (then
    (global.set $ending #0)
    (call $say @ended@ (call $done)))))
(on delete (if (i32.eq (local.get $id) #1) (then (call $log @root delete@))))
